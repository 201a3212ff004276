"""The decoder of a bundle: what its graphs compute, tiles, and what is refused."""

import json
import shutil

import msgspec
import numpy as np
import pytest
import torch

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
