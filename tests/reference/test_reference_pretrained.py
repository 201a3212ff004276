"""Folders of diffusers: every layout that is read, each fact that is taken or asked for, each refusal."""

import json
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from saved_pipelines import dit, save, scheduler, unet

from diffexport.errors import BackendError, CheckpointError, SpecError
from diffexport.schedules import DEFAULT_SCHEDULES, schedule_sigmas
from diffexport_reference.checkpoints import load_checkpoint, read_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DDPM pipeline and a DiT pipeline; copy them before changing anything."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder / "ddpm", unet(), scheduler())
    save(folder / "dit", dit(num_embeds_ada_norm=5), scheduler("DDIMScheduler", clip_sample=False))
    return folder


@pytest.fixture
def pipeline(saved, tmp_path):
    """``pipeline(name)`` is a copy of a saved one; other arguments change its scheduler's or network's configuration."""

    def make(name, part="scheduler", **config):
        folder = shutil.copytree(saved / name, tmp_path / name, dirs_exist_ok=True)
        if config:
            file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return make


def same_as(network, folder, **facts):
    """The module that is read gives what diffusers' own network gives."""
    module, spec = load_checkpoint(folder, **facts)
    x, t = torch.randn(2, *spec.shape), torch.tensor([3.0, 700.0])
    labels = torch.tensor([0, 3]) if spec.conditional else None
    given = () if labels is None else (labels,)
    with torch.no_grad():
        expected = network(x, t, **({} if labels is None else {"class_labels": labels})).sample
        return torch.equal(module(x, t, *given), expected[:, : spec.output_shape[0]])


def test_a_ddpm_pipeline(pipeline):
    found = read_checkpoint(pipeline("ddpm"))
    spec = found.spec
    assert (spec.family, spec.shape, spec.num_classes, spec.prediction) == ("diffusers U-Net", (3, 8, 8), 0, "eps")
    assert (spec.scaled, spec.noise_input, spec.unit_start, spec.spacing) == (True, "timestep", True, "leading")
    assert (spec.schedule, spec.clip, spec.clip_keeps, spec.variance) == (DEFAULT_SCHEDULES["ddpm"], 1.0, "x", "small")
    assert found.vae is None
    assert found.notes == (
        "took the process from scheduler/scheduler_config.json: eps on 1000 ddpm levels, leading steps, "
        "estimates clamped to +-1",
    )
    assert same_as(unet(), pipeline("ddpm"))
    assert not any(p.requires_grad for p in found.module.parameters())
    json.dumps(spec.architecture)


def test_a_dit_pipeline(pipeline):
    found = read_checkpoint(pipeline("dit"))
    spec = found.spec
    assert (spec.family, spec.shape, spec.num_classes, spec.null_label) == ("diffusers DiT", (4, 8, 8), 5, 5)
    assert (spec.variance, spec.guided_channels, spec.clip, spec.clip_keeps) == ("learned", None, None, "eps")
    assert found.vae == pipeline("dit") / "vae"
    assert same_as(dit(num_embeds_ada_norm=5), pipeline("dit"))
    assert load_checkpoint(pipeline("dit"), guidance_channels=3)[1].guided_channels == 3


@pytest.mark.parametrize("layout", ["bin", "shards", "bin shards", "variant", "half", "flat", "inside", "old names"])
def test_layouts_of_weights(pipeline, layout):
    folder = pipeline("ddpm")
    part, network = folder / "unet", unet()
    (part / "diffusion_pytorch_model.safetensors").unlink()
    if layout == "variant":
        network.save_pretrained(part, variant="fp16")
    elif layout == "half":
        network.half().save_pretrained(part)
        network = network.float()
    else:
        shard = "100KB" if "shards" in layout else "10GB"
        network.save_pretrained(part, safe_serialization="bin" not in layout, max_shard_size=shard)
    if layout == "flat":  # as the first releases were published
        for file in (*part.iterdir(), folder / "scheduler" / "scheduler_config.json"):
            file.rename(folder / file.name)
        part.rmdir()
        (folder / "scheduler").rmdir()
    if layout == "old names":
        file = part / "diffusion_pytorch_model.safetensors"
        state = safetensors.torch.load_file(file)
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
        assert any("proj_attn" in name for name in state)
        safetensors.torch.save_file(state, file)
    if "shards" in layout:
        assert len(list(part.glob("*-of-*"))) > 1
    notes = read_checkpoint(folder).notes
    assert same_as(network, part if layout == "inside" else folder)
    assert (notes[-1] == "took the variant diffusion_pytorch_model.fp16.safetensors") == (layout == "variant")


def test_the_published_dit_is_saved_under_an_older_class(pipeline):
    folder = pipeline("dit", "transformer", _class_name="Transformer2DModel", num_vector_embeds=None)
    assert same_as(dit(num_embeds_ada_norm=5), folder)


def test_networks_without_a_scheduler(tmp_path):
    dit(num_embeds_ada_norm=5).save_pretrained(tmp_path / "dit")
    found = read_checkpoint(tmp_path / "dit")
    assert "found no scheduler_config.json: took the process of the published DiT" in found.notes[0]
    assert (found.spec.prediction, found.spec.schedule, found.spec.spacing) == (
        "eps",
        DEFAULT_SCHEDULES["ddpm"],
        "leading",
    )
    unet(sample_size=None).save_pretrained(tmp_path / "unet")
    with pytest.raises(
        SpecError, match=r"no scheduler_config.json .* give --prediction .*, --schedule .*, or the folder"
    ):
        load_checkpoint(tmp_path / "unet")
    facts = {"prediction": "v", "schedule": "cosine"}
    with pytest.raises(SpecError, match="says no sample_size: give --image-size N"):
        load_checkpoint(tmp_path / "unet", **facts)
    (tmp_path / "unet.json").write_text(json.dumps(facts | {"image_size": 8}))
    found = read_checkpoint(tmp_path / "unet")
    assert (found.spec.shape, found.spec.prediction, found.spec.clip) == ((3, 8, 8), "v", None)
    assert "took image_size, prediction, schedule from unet.json" in found.notes
    with pytest.raises(SpecError, match="--prediction flow: a flow model of diffusers is not supported"):
        load_checkpoint(tmp_path / "unet", prediction="flow")


def test_labels_of_a_unet_ask_for_the_meaning_of_the_last(tmp_path):
    folder, network = tmp_path / "p", unet(num_class_embeds=6)
    save(folder, network, scheduler())
    with pytest.raises(SpecError, match=r"num_class_embeds 6: give --null-label last .* or --null-label none"):
        load_checkpoint(folder)
    for null_label, labels in (("last", 5), ("none", 6)):
        spec = load_checkpoint(folder, null_label=null_label)[1]
        assert (spec.num_classes, spec.guidable) == (labels, null_label == "last")
    assert same_as(network, folder, null_label="last")


@pytest.mark.parametrize("config", [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
])  # fmt: skip
def test_betas_are_those_of_the_scheduler(pipeline, config):
    spec = load_checkpoint(pipeline("ddpm", **config))[1]
    alpha_bar = scheduler(**config).alphas_cumprod.double()
    found = torch.from_numpy(1 / (1 + schedule_sigmas(spec.schedule) ** 2))
    assert torch.allclose(found, alpha_bar, rtol=2e-4 if "squaredcos_cap_v2" in config.values() else 2e-5)


@pytest.mark.parametrize(("config", "message"), [
    ({"_class_name": "PNDMScheduler"}, "_class_name 'PNDMScheduler' is not supported; supported: 'DDPMScheduler', "),
    ({"thresholding": True}, "thresholding True is not supported; supported: False"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True is not supported"),
    ({"prediction_type": "flow_prediction"}, "'flow_prediction' .* supported: 'epsilon', 'sample', 'v_prediction'"),
    ({"beta_schedule": "laplace"}, "beta_schedule 'laplace' is not supported; supported: 'linear', 'scaled_linear'"),
    ({"variance_type": "learned"}, "variance_type 'learned' is not supported"),
    ({"variance_type": "fixed_large_log"}, "variance_type 'fixed_large_log' is not supported"),
    ({"variance_type": "learned_range"}, "in_channels 3 and out_channels 3 with .* 'learned'; expected 6"),
    ({"variance_type": "fixed_large", "timestep_spacing": "trailing"}, "adds noise in the last step"),
    ({"timestep_spacing": "karras"}, "timestep_spacing 'karras' is not supported"),
    ({"steps_offset": 1}, "steps_offset 1 is not supported; supported: 0"),
    ({"_class_name": "DDIMScheduler", "timestep_spacing": "linspace"}, "'linspace' is not supported"),
    ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, "set_alpha_to_one False is not supported"),
    ({"trained_betas": [0.1]}, "trained_betas holds 1 numbers, num_train_timesteps says 1000"),
    ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, "a number outside 0..1"),
    ({"beta_start": "low"}, "scheduler_config.json: Expected `float`, got `str`"),
])  # fmt: skip
def test_schedulers_that_cannot_be_repeated_are_refused(pipeline, config, message):
    with pytest.raises((SpecError, CheckpointError), match=message) as error:
        load_checkpoint(pipeline("ddpm", **config))
    assert "\n" not in str(error.value)
    assert str(pipeline("ddpm")) in str(error.value)


@pytest.mark.parametrize(("config", "message"), [
    ({"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel', which is not supported; supported: DiT"),
    ({"_class_name": None}, "is of class None"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier' is not supported; supported: 'positional'"),
    ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not supported"),
    ({"out_channels": 6}, "in_channels 3 and out_channels 6 with a scheduler of variance 'small'; expected 3"),
    ({"block_out_channels": [8]}, r"describes no UNet2DModel \(ValueError: Must provide the same number"),
    ({"block_out_channels": [8, 32]}, r"group_norm.weight has shape \(16,\), expected \(32,\) \(and 99 more\)"),
    ({"layers_per_block": 2}, "looks like a diffusers U-Net, but .* are missing"),
])  # fmt: skip
def test_networks_that_cannot_be_read_are_refused(pipeline, config, message):
    with pytest.raises((SpecError, CheckpointError), match=message) as error:
        load_checkpoint(pipeline("ddpm", "unet", **config))
    assert "\n" not in str(error.value)


def test_damaged_folders_are_refused(pipeline, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: is a folder without model_index.json or config.json"):
        load_checkpoint(tmp_path / "empty")
    folder = pipeline("ddpm")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match=r"a config.json lies beside it: give the folder .*unet"):
        load_checkpoint(weights)
    with pytest.raises(SpecError, match="--weights ema: this folder holds one set of weights"):
        load_checkpoint(folder, weights="ema")
    with pytest.raises(SpecError, match="--prediction v: this checkpoint says eps"):
        load_checkpoint(folder, prediction="v")
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({**state, "conv_in.bias": state["conv_in.bias"] * float("nan")}, weights)
    with pytest.raises(CheckpointError, match=r"conv_in.bias holds NaN"):
        load_checkpoint(folder)
    safetensors.torch.save_file({name: value for name, value in state.items() if name != "conv_in.bias"}, weights)
    with pytest.raises(CheckpointError, match=r"looks like a diffusers U-Net, but conv_in.bias is missing"):
        load_checkpoint(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"unet holds no weights: expected diffusion_pytorch_model.safetensors"):
        load_checkpoint(folder)
    index = {"weight_map": {"conv_in.bias": "../../elsewhere.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names '../../elsewhere.safetensors', expected a file beside it"):
        load_checkpoint(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model_index.json is no JSON object"):
        load_checkpoint(folder)
    (folder / "model_index.json").write_text('{"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(CheckpointError, match="is a pipeline of vae; expected a transformer or a unet"):
        load_checkpoint(folder)


def test_a_pickle_in_a_folder_runs_no_code(pipeline):
    class Evil:
        def __reduce__(self):
            return (print, ("code that ran",))

    folder = pipeline("ddpm")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.bias": Evil()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused: reading it could run code"):
        load_checkpoint(folder)


@pytest.mark.parametrize(("names", "message"), [
    ({"0": "a", "2": "b"}, "names 2 labels, expected 0..1 without a gap"),
    ({"0": 3}, "id2label: Expected `str`"),
    ({"0": "a", "1": "b"}, "got 2 names for 5 classes"),
])  # fmt: skip
def test_label_names_that_do_not_fit_are_refused(pipeline, names, message):
    folder = pipeline("dit")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    with pytest.raises((SpecError, CheckpointError), match=message):
        load_checkpoint(folder)


def test_without_diffusers_the_extra_is_named(pipeline, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        BackendError, match=r"reading a UNet2DModel needs diffusers; pip install 'diffexport\[export,dif"
    ):
        load_checkpoint(pipeline("ddpm"))


def test_reading_is_quiet_and_fetches_nothing(pipeline):
    """In a process of its own, warnings being errors and every socket refused."""
    script = (
        "import socket, sys\n"
        "def refuse(*_): raise SystemExit('the network was touched')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from diffexport_reference.checkpoints import load_checkpoint\n"
        "load_checkpoint(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(pipeline("ddpm"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
