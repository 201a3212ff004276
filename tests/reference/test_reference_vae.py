"""The decoder beside diffusers' own ``AutoencoderKL.decode``, read from folders that diffusers writes."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffexport.errors import CheckpointError
from diffexport.parity import relative_l2
from diffexport.spec import DecoderSpec
from diffexport_reference.vae import load_decoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}


def autoencoder(**config):
    """One of diffusers' with random weights, also where it starts from ones and zeros."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**SMALL, **config}).eval().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    return vae


def assert_same(module, vae, z):
    """In float64, where an error of arithmetic cannot pass for rounding."""
    with torch.no_grad():
        found, expected = module.double()(z.double()), vae.double().decode(z.double()).sample
    assert relative_l2(found.numpy(), expected.numpy()) < 1e-12


@pytest.mark.parametrize(("config", "spec"), [
    ({}, DecoderSpec(upscale=4, tile=512, scaling_factor=0.18215)),
    ({"scaling_factor": 1.5305, "shift_factor": 0.0609},
     DecoderSpec(upscale=4, tile=512, scaling_factor=1.5305, shift=0.0609)),
    ({"use_quant_conv": False, "use_post_quant_conv": False}, DecoderSpec(upscale=4, tile=512, scaling_factor=0.18215)),
    ({"mid_block_add_attention": False, "latent_channels": 16}, DecoderSpec(upscale=4, tile=512, scaling_factor=0.18215)),
    ({"layers_per_block": 1, "out_channels": 1, "in_channels": 1},
     DecoderSpec(upscale=4, tile=512, channels=1, scaling_factor=0.18215)),
])  # fmt: skip
@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_decodes_as_diffusers_does(tmp_path, config, spec, safe):
    vae = autoencoder(**config)
    vae.save_pretrained(tmp_path / "vae", safe_serialization=safe)
    module, found = load_decoder(tmp_path / "vae")
    assert found == spec
    assert_same(module, vae, torch.randn(2, vae.config.latent_channels, 6, 9))


def test_the_shapes_of_stable_diffusion_are_the_default():
    from diffexport_reference.vae import VaeDecoder

    with torch.device("meta"):
        theirs = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).state_dict()
        ours = VaeDecoder().state_dict()
    decoding = {name: value.shape for name, value in theirs.items() if name.startswith(("decoder.", "post_quant"))}
    assert {name: value.shape for name, value in ours.items()} == decoding
    assert sum(value.numel() for value in ours.values()) == 49_490_199


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_old_names_of_attention_are_read(tmp_path, convolutions):
    """As published before diffusers 0.12, and as the original repository's 1x1 convolutions."""
    vae = autoencoder()
    vae.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        for kind in ("weight", "bias"):
            value = state.pop(f"decoder.mid_block.attentions.0.{new}.{kind}")
            wide = convolutions and kind == "weight"
            state[f"decoder.mid_block.attentions.0.{old}.{kind}"] = value[:, :, None, None] if wide else value
    save_file(state, tmp_path / WEIGHTS)
    module, _ = load_decoder(tmp_path)
    assert_same(module, vae, torch.randn(1, 4, 5, 5))


def test_of_a_pipeline_the_vae_is_taken(tmp_path):
    autoencoder().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert load_decoder(tmp_path)[1].upscale == 4


def drop_tensor(folder):
    state = load_file(folder / WEIGHTS)
    del state["decoder.up_blocks.1.resnets.0.conv2.bias"]
    save_file(state, folder / WEIGHTS)


def set_config(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


@pytest.mark.parametrize(("damage", "message"), [
    (drop_tensor, r"AutoencoderKL decoder, but decoder\.up_blocks\.1\.resnets\.0\.conv2\.bias is missing"),
    (lambda folder: (folder / WEIGHTS).unlink(), "no weights in it; expected diffusion_pytorch_model"),
    (lambda folder: (folder / "config.json").unlink(), r"config\.json cannot be read"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: "),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"\0" * 100), "damaged or cut short"),
    (set_config(_class_name="VQModel"), "_class_name is 'VQModel', known here is 'AutoencoderKL' alone"),
    (set_config(up_block_types=["AttnUpDecoderBlock2D"]), "up_block_types is 'AttnUpDecoderBlock2D'"),
    (set_config(latents_mean=[0.0] * 4), "latents_mean"),
    (set_config(scaling_factor=0.0), "scaling_factor 0"),
    (set_config(norm_num_groups=5), "divisible"),
])  # fmt: skip
def test_a_folder_that_is_not_one_is_one_line(tmp_path, damage, message):
    autoencoder().save_pretrained(tmp_path / "vae")
    damage(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_decoder(tmp_path / "vae")
    assert str(caught.value).startswith(str(tmp_path / "vae"))
    assert "\n" not in str(caught.value)
