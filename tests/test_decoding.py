"""The decoder of a bundle: what its graphs compute, tiles, and what is refused."""

import json
import shutil

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from refusals import assert_refused

import diffexport
from diffexport.backends.onnxruntime import run_graph
from diffexport.bundle import MANIFEST, Bundle
from diffexport.decoding import decode, spans, tile_of
from diffexport.errors import BundleError, ExportError, ParityError, PlanError, ShapeError
from diffexport.parity import relative_l2
from diffexport.spec import DecoderSpec
from diffexport.verification import verify
from diffexport_reference.vae import VaeDecoder


@pytest.fixture(scope="module")
def vae():
    """The shape of Stable Diffusion's decoder, small, and its spec."""
    torch.manual_seed(0)
    module = VaeDecoder(latents=2, widths=(8, 16, 16), layers=2, groups=4).eval().requires_grad_(False)
    return module, DecoderSpec(upscale=4, scaling_factor=0.18215, shift=0.05)


def test_the_decoder_graph_is_the_module_on_unscaled_latents_of_any_size(toy, vae, tmp_path, rng):
    bundle = diffexport.export(*toy("plain"), tmp_path / "vae.diffx", decoder=vae, max_batch=2)
    module, spec = vae
    for shape in ((1, 2, 6, 6), (3, 2, 5, 9), (2, 2, 1, 1)):
        x = rng.standard_normal(shape).astype(np.float32)
        with torch.no_grad():
            expected = module.double()(torch.from_numpy(x).double() / 0.18215 + 0.05).numpy()
        found = run_graph(bundle.graph("decoder"), {"x": x})["image"]
        assert found.shape == (shape[0], 3, 4 * shape[2], 4 * shape[3])
        assert relative_l2(found, expected) < 1e-5
    module.float()
    assert bundle.manifest.decoder.parameters == sum(p.numel() for p in module.parameters())
    assert bundle.manifest.decoder.scaling_factor == spec.scaling_factor


def test_one_call_from_label_to_image_is_sampling_and_decoding(toy_bundle):
    with toy_bundle("decoded").sampler() as s:
        images = []
        settings = {"sampler": "ddpm", "steps": 5, "guidance_scale": 2.0, "seed": 3, "batch": 2}
        x = s.sample([3, 1, 4], one_call=True, on_images=images.append, **settings)
        stepped = s.sample([3, 1, 4], **settings)
        np.testing.assert_allclose(x, stepped, atol=1e-5)
        np.testing.assert_allclose(np.concatenate(images), s.decode(stepped), atol=1e-5)
        assert s.decode(stepped).shape == (3, 3, 12, 12)


def test_a_wrong_decoder_is_seen(toy, toy_decoder, toy_bundle, tmp_path, monkeypatch):
    """By the export, by the golden case, and by verification beside another module."""
    from diffexport.exporter import graphs

    path = toy_bundle("decoded").path
    network, spec = toy("variance")
    decoder, _ = toy_decoder()
    assert all(f.passed for f in verify(path, ("ort", "torch"), module=network, spec=spec, decoder=decoder))
    with torch.no_grad():
        decoder.last.bias += 0.01
    failed = [f.name for f in verify(path, module=network, spec=spec, decoder=decoder) if not f.passed]
    assert failed == ["weights of the decoder", "results beside PyTorch's"]

    honest = graphs.apply_decoder
    monkeypatch.setattr(
        "diffexport.exporter.graphs.apply_decoder",
        lambda b, network, spec, x: honest(b, network, msgspec.structs.replace(spec, shift=0.2), x),
    )
    with pytest.raises(ParityError, match="the worst is decoder, batch"):
        diffexport.export(network, spec, tmp_path / "x.diffx", decoder=toy_decoder(), max_batch=2)
    assert list(tmp_path.iterdir()) == []
    wrong = diffexport.export(
        network, spec, tmp_path / "x.diffx", decoder=toy_decoder(), max_batch=2, allow_mismatch=True
    )
    assert [f.name for f in verify(wrong.path) if not f.passed] == ["certificate", "golden cases on ort"]


@pytest.mark.parametrize(("facts", "message"), [
    ({"upscale": 4}, r"makes \(1, 3, 8, 8\) of latents \(1, 2, 4, 4\), its spec says \(1, 3, 16, 16\)"),
    ({"channels": 1}, "its spec says"),
])  # fmt: skip
def test_a_decoder_that_does_not_fit_is_refused(toy, toy_decoder, tmp_path, facts, message):
    module, spec = toy_decoder()
    with pytest.raises(ExportError, match=message):
        diffexport.export(
            *toy("plain"), tmp_path / "x.diffx", decoder=(module, msgspec.structs.replace(spec, **facts)), max_batch=2
        )
    with pytest.raises(ExportError, match="does not take latents of 2 channels"):
        diffexport.export(*toy("plain"), tmp_path / "x.diffx", decoder=(torch.nn.Conv2d(4, 3, 1), spec))
    with pytest.raises(ExportError, match=r"expected latents \(C, h, w\)"):
        diffexport.export(*toy("points"), tmp_path / "x.diffx", decoder=(module, spec))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_a_decoder_says_so(toy_bundle, rng):
    with toy_bundle("plain").sampler() as s:
        with pytest.raises(BundleError, match="no decoder; export the model with --vae"):
            s.decode(rng.standard_normal((1, 2, 6, 6)).astype(np.float32))
        with pytest.raises(BundleError, match="no decoder"):
            s.sample([1], one_call=True, on_images=print)
    with toy_bundle("decoded").sampler() as s, pytest.raises(PlanError, match="one_call=True"):
        s.sample([1], on_images=print)


def test_manifests_from_before_decoders_are_read(toy_bundle, tmp_path):
    path = tmp_path / "old.diffx"
    shutil.copytree(toy_bundle("plain").path, path)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest.pop("decoder") is None
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert Bundle.open(path).manifest.decoder is None


class Nearest:
    """A decoder without surroundings: every latent becomes a square of pixels. Tiles of it are exact."""

    def __init__(self):
        self.sizes = []

    def decode(self, x):
        self.sizes.append(x.shape)
        return x[:, :3].repeat(8, 2).repeat(8, 3)


@pytest.mark.parametrize(("height", "width", "tile", "count"), [
    (32, 32, 0, 1), (32, 32, 256, 1), (64, 64, 256, 9), (33, 32, 256, 2), (40, 70, 256, 2 * 3), (64, 16, 128, 5),
])  # fmt: skip
def test_tiles_cover_an_image_and_add_up(rng, height, width, tile, count):
    x = rng.standard_normal((2, 4, height, width)).astype(np.float32)
    session, seen = Nearest(), []
    decoder = DecoderSpec(upscale=8, tile=tile or None)
    images = decode(session, decoder, x, on_tile=lambda done, total: seen.append((done, total)))
    np.testing.assert_allclose(images, x[:, :3].repeat(8, 2).repeat(8, 3), atol=1e-6)
    assert set(session.sizes) == {(1, 4, min(height, tile // 8 or height), min(width, tile // 8 or width))}
    assert seen == [(k + 1, 2 * count) for k in range(2 * count)]


def test_tiles_fade_into_each_other():
    """No tile's edge shows: weights of neighbouring pixels differ by no more than the ramp's slope."""
    for side in (33, 40, 64, 100):
        parts = spans(side, 32, 8)
        weights = np.zeros((len(parts), 8 * side))
        for row, part in zip(weights, parts, strict=True):
            row[part.pixels] = part.weight
        np.testing.assert_allclose(weights.sum(0), 1, atol=1e-6)
        assert np.abs(np.diff(weights)).max() < 1.5 / (32 // 4 * 8)


def test_the_tile_of_a_call_goes_before_the_bundles():
    decoder = DecoderSpec(upscale=8, tile=512)
    assert [tile_of(decoder), tile_of(decoder, 256), tile_of(decoder, 0), tile_of(DecoderSpec(upscale=8))] == [
        64, 32, 0, 0,
    ]  # fmt: skip
    for wrong in (-8, 100, 8):
        with pytest.raises(ShapeError, match=f"tile {wrong}: expected a multiple of 8 pixels, at least 32"):
            tile_of(decoder, wrong)


@pytest.fixture
def latent_dit(tmp_path):
    """An official DiT of latents and an AutoencoderKL of diffusers', as files in an empty folder."""
    from diffusers import AutoencoderKL

    from diffexport_reference.official_dit import OfficialDiT

    torch.manual_seed(0)
    network = OfficialDiT(input_size=8, hidden_size=24, depth=1, num_heads=2, num_classes=10)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save(network.state_dict(), tmp_path / "dit.pt")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    vae.eval().requires_grad_(False).save_pretrained(tmp_path / "vae")
    return vae


def test_from_a_checkpoint_and_an_autoencoder_to_pictures(diffx, latent_dit, tmp_path):
    status, out, _ = diffx("export", "dit.pt", "--heads", 2, "--vae", "vae", "--max-batch", 2)
    assert (status, "M parameters, images 3 x 32 x 32, latents" in out) == (0, True)
    assert "latents divided by 0.18215" in diffx("inspect", "dit.diffx")[1]
    status, out, _ = diffx("verify", "dit.diffx", "--backend", "all", "--against", "dit.pt", "--vae", "vae")
    assert (status, "weights of the decoder: are those exported" in out) == (0, True)

    run = ("sample", "dit.diffx", "--labels", "1,2,3,4", "--steps", 3, "--guidance-scale", 4)
    assert diffx(*run, "--out", "grid.png", "--npz", "a.npz")[0] == 0
    arrays = np.load("a.npz")
    with torch.no_grad():
        expected = latent_dit.decode(torch.from_numpy(arrays["x"]) / latent_dit.config.scaling_factor).sample.numpy()
    assert relative_l2(arrays["images"], expected) < 1e-5
    with Image.open("grid.png") as picture:
        shown = np.asarray(picture.crop(picture.getbbox()))
    pixels = np.clip(np.rint((expected.transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255)
    corners = [shown[top:, left:][:64:2, :64:2] for top, left in ((20, 4), (20, 72), (104, 4), (104, 72))]
    assert all(np.abs(tile - wanted).max() <= 1 for tile, wanted in zip(corners, pixels, strict=True))

    assert diffx(*run, "--one-call", "--npz", "b.npz")[0] == 0
    np.testing.assert_allclose(np.load("b.npz")["images"], arrays["images"], atol=1e-4)
    torch_run = (*run, "--backend", "torch", "--checkpoint", "dit.pt", "--npz", "c.npz")
    assert_refused(diffx(*torch_run), "give --vae FOLDER")
    assert diffx(*torch_run, "--vae", "vae")[0] == 0
    np.testing.assert_allclose(np.load("c.npz")["images"], arrays["images"], atol=1e-4)
    assert diffx(*run, "--latents", "--npz", "d.npz")[0] == 0
    assert np.load("d.npz").files == ["x", "labels"]

    for words in ((), ("--one-call",)):
        assert diffx(*run, "--tile", 16, "--npz", "e.npz", *words)[0] == 0
        tiled = np.load("e.npz")["images"]
        assert 1e-3 < relative_l2(tiled, expected) < 0.5  # normalizations of random weights see a part of the image
    assert diffx(*run, "--out", "pictures/")[0] == 0
    with Image.open("pictures/000002.png") as picture:
        assert np.abs(np.asarray(picture) - pixels[2]).max() <= 1
    assert_refused(diffx(*run, "--tile", 16, "--out", "pictures/"), "another run (tile 512 there, 16 now)")


@pytest.mark.parametrize(("name", "words", "message"), [
    ("plain", ("--latents",), "--latents: "),
    ("plain", ("--tile", "64"), "has no decoder; leave it out"),
    ("decoded", ("--tile", "7"), "tile 7: expected a multiple of 2 pixels, at least 8"),
    ("decoded", ("--vae", "vae"), "runs the bundle; leave it out"),
])  # fmt: skip
def test_bad_calls_are_one_line_and_write_nothing(diffx, toy_bundle, tmp_path, name, words, message):
    assert_refused(diffx("sample", toy_bundle(name).path, *words), message)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_autoencoder_is_one_line_and_leaves_nothing(diffx, latent_dit, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert_refused(diffx("export", "dit.pt", "--heads", 2, "--vae", "nowhere"), "nowhere: config.json cannot be read")
    assert_refused(diffx("verify", "dit.diffx", "--vae", "vae"), "give --against CKPT too")
    assert sorted(tmp_path.iterdir()) == before
