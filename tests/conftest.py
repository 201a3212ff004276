"""Small networks with random weights, and bundles of them, for tests that need any model at all."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import diffexport
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import DecoderSpec, ModelSpec
from diffexport_cli.app import main

torch.set_num_threads(1)


class ToyNetwork(nn.Module):
    """Convolutions that are told noise and label by a shift; C or 2C channels out."""

    def __init__(self, channels=2, outputs=2, num_classes=5):
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, 16) if num_classes else None
        self.noise = nn.Linear(2, 16)
        self.first = nn.Conv2d(channels, 16, 3, padding=1)
        self.last = nn.Conv2d(16, outputs, 3, padding=1)

    def forward(self, x, c_noise, label=None):
        c = 0.5 * torch.log1p(c_noise)
        shift = self.noise(torch.stack([c.sin(), c.cos()], 1))
        if self.embedding is not None:
            shift = shift + self.embedding(label)
        return self.last(torch.tanh(self.first(x) + shift[:, :, None, None]))


class ToyPoints(nn.Module):
    """A network of points without labels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x, c_noise):
        return self.net(torch.cat([x, torch.log1p(c_noise)[:, None]], 1))


class ToyDecoder(nn.Module):
    """A decoder of two channels of latents to RGB at twice the side, whose every pixel depends on all latents."""

    spec = DecoderSpec(upscale=2, scaling_factor=0.7, shift=0.1)

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, latents):
        h = nn.functional.silu(self.norm(self.first(latents)))
        return self.last(nn.functional.interpolate(h, scale_factor=2.0))


def _toys():
    ddpm, flow = DEFAULT_SCHEDULES["ddpm"], DEFAULT_SCHEDULES["flow"]
    picture = {"shape": (2, 6, 6), "num_classes": 5}
    return {
        "plain": (
            lambda: ToyNetwork(),
            ModelSpec(family="toy", prediction="v", scaled=True, schedule=ddpm, **picture),
        ),
        "variance": (  # everything that a model can have at once
            lambda: ToyNetwork(outputs=4),
            ModelSpec(
                family="toy variance",
                prediction="eps",
                schedule=ddpm,
                variance="learned",
                guided_channels=1,
                clip=1.5,
                noise_input="timestep",
                unit_start=True,
                spacing="respaced",
                label_names=("ant", "bee", "cat", "dog", "eel"),
                **picture,
            ),
        ),
        "flow": (lambda: ToyNetwork(), ModelSpec(family="toy flow", prediction="flow", schedule=flow, **picture)),
        "unguided": (  # labels without a null label, and a clamp that keeps the predicted noise
            lambda: ToyNetwork(num_classes=4),
            ModelSpec(
                family="toy unguided",
                prediction="eps",
                scaled=True,
                schedule=ddpm,
                noise_input="timestep",
                unit_start=True,
                spacing="leading",
                clip=1.0,
                clip_keeps="eps",
                has_null=False,
                **picture,
            ),
        ),
        "points": (ToyPoints, ModelSpec(family="toy points", prediction="x0", schedule=ddpm, shape=(2,))),
    }


TOYS = _toys()


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory):
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def toy():
    """``toy(name)`` gives the module and spec of one of TOYS, the same weights every time."""

    def make(name):
        build, spec = TOYS[name]
        torch.manual_seed(0)
        return build().eval(), spec

    return make


@pytest.fixture(scope="session")
def toy_decoder():
    """``toy_decoder()`` gives a decoder of toy pictures and its spec, the same weights every time."""

    def make():
        torch.manual_seed(1)
        return ToyDecoder().eval(), ToyDecoder.spec

    return make


@pytest.fixture(scope="session")
def toy_bundle(toy, toy_decoder, tmp_path_factory):
    """``toy_bundle(name)`` gives the bundle of one of TOYS, exported once; "decoded" is "variance" with a decoder."""
    made = {}

    def make(name):
        if name not in made:
            out = tmp_path_factory.mktemp("bundles") / f"{name}.diffx"
            network, decoder = (toy("variance"), toy_decoder()) if name == "decoded" else (toy(name), None)
            made[name] = diffexport.export(*network, out, decoder=decoder, max_batch=4)
        return made[name]

    return make


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def diffx(capsys, monkeypatch, tmp_path):
    """``diffx(*words)`` runs a command in an empty folder and gives its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["diffx", *map(str, words)])
        try:
            main()
            status = 0
        except SystemExit as exit_:
            status = exit_.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def cpp():
    """The C++ runtime; see ``cpp_build.Built``."""
    from cpp_build import Built

    built = Built()
    built.build()
    return built
