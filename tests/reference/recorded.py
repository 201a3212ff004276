"""Recorded runs of the two upstream code bases, and the networks that they were made with."""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from diffexport_reference import (
    CondEmbedderLabel,
    ConditionalMLP,
    DiT,
    ModelMixin,
    OfficialDiT,
    PredFlow,
    PredV,
    PredX0,
    Scaled,
    SigmaEmbedderSinCos,
    TimeInputMLP,
    TimestepEmbedder,
    Unet,
)

ORACLES = Path(__file__).parent.parent / "oracles"
MODIFIERS = {"scaled": Scaled, "v": PredV, "x0": PredX0, "flow": PredFlow}
NOT_ARGUMENTS = (
    "arch",
    "modifier",
    "family",
    "schedule",
    "steps",
    "weights",
    "cfg_scale",
    "cfg_channels",
    "loops",
    "note",
)


def network_class(modifier, base):
    """The class with modifiers named as in ``scaled_v``: the first is the outermost."""
    for name in reversed(modifier.split("_")):
        base = MODIFIERS.get(name, lambda cls: cls)(base)
    return base


def _embedded(cls, width, sig_embed="SigmaEmbedderSinCos", num_classes=0, **args):
    embedders = {"SigmaEmbedderSinCos": SigmaEmbedderSinCos, "TimestepEmbedder": TimestepEmbedder}
    cond_embed = CondEmbedderLabel(width, num_classes) if num_classes else None
    return cls(**args, sig_embed=embedders[sig_embed](width), cond_embed=cond_embed)


BUILDERS = {
    "DiT": (DiT, lambda cls, **args: _embedded(cls, args["head_dim"] * args["num_heads"], **args)),
    "Unet": (Unet, lambda cls, **args: _embedded(cls, 4 * args["ch"], **args)),
    "TimeInputMLP": (TimeInputMLP, lambda cls, **args: cls(**args)),
    "ConditionalMLP": (ConditionalMLP, lambda cls, **args: cls(**args)),
    "official DiT": (OfficialDiT, lambda cls, **args: cls(**args)),
}


class Recorded:
    """One recorded case: what it was made with, its arrays as tensors, and the network with its weights."""

    def __init__(self, name):
        self.name = name
        self.case = json.loads((ORACLES / "index.json").read_text())[name]
        with np.load(ORACLES / f"{name}.npz") as arrays:
            self.arrays = {key: torch.from_numpy(value) for key, value in arrays.items()}

    def __getitem__(self, key):
        return self.arrays[key]

    def get(self, key):
        return self.arrays.get(key)

    @property
    def weights(self):
        return ORACLES / self.case["weights"]

    def network(self):
        base, make = BUILDERS[self.case["arch"]]
        cls = network_class(self.case.get("modifier", "plain"), base)
        network = make(cls, **{k: v for k, v in self.case.items() if k not in NOT_ARGUMENTS})
        network.load_state_dict(safetensors.torch.load_file(self.weights))
        return network.eval()


def names(arch):
    """The recorded cases of an architecture."""
    index = json.loads((ORACLES / "index.json").read_text())
    return [name for name, case in index.items() if case.get("arch") == arch]


def relative_error(got, expected):
    """Relative L2 of the difference."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def close(got, expected, limit=1e-5):
    """Whether the relative L2 of the difference is within the limit."""
    return relative_error(got, expected) <= limit


def check_network(recorded):
    """Everything recorded of a network, but its sampling runs."""
    network: ModelMixin = recorded.network()
    x, sigma, cond = recorded["x"], recorded["sigma"], recorded.get("cond")
    with torch.no_grad():
        assert close(network(x, sigma, cond=cond), recorded["forward"])
        assert close(network.predict_eps(x, sigma, cond), recorded["eps"])
        levels = recorded["sigma_batch"]
        for shaped in (levels, levels.flatten()):
            assert close(network.predict_eps(x, shaped, cond), recorded["eps_batch"])
        for key in recorded.arrays:
            if key.startswith("eps_cfg_"):
                scale = float(key.removeprefix("eps_cfg_"))
                assert close(network.predict_eps_cfg(x, sigma, cond, scale), recorded[key])
                each = sigma.expand(len(x), *[1] * (x.ndim - 1))
                assert close(network.predict_eps_cfg(x, each, cond, scale), recorded[key])
        for shaped in (levels, levels.flatten()):
            loss = network.get_loss(recorded["loss_x0"], shaped, recorded["loss_eps"], cond=cond)
            assert close(loss, recorded["loss"])


def check_trace(network, num_classes=0):
    """A network is traced with a dynamic batch, and the trace agrees at other batches, also at one."""
    batch = torch.export.Dim("batch", min=1, max=64)
    network = network.eval()

    def arguments(n):
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(n, *network.input_dims, generator=generator)
        labels = [torch.arange(n) % num_classes] if num_classes else []
        return (x, torch.rand(n, generator=generator) + 0.1, *labels)

    program = torch.export.export(network, arguments(3), dynamic_shapes=tuple({0: batch} for _ in arguments(3)))
    traced = program.module()
    for n in (1, 2, 5):
        with torch.no_grad():
            assert close(traced(*arguments(n)), network(*arguments(n)), 1e-6)
