"""Real engines in half precision, and of the families of networks, built by TensorRT for RTX without a GPU."""

import pytest
import torch

import diffexport
from diffexport.engines.build import build
from diffexport.engines.network import TYPES, share
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import ModelSpec
from diffexport_reference import Unet
from diffexport_reference.official_dit import OfficialDiT

PICTURE = {"schedule": DEFAULT_SCHEDULES["ddpm"], "num_classes": 5, "prediction": "eps"}


def official_dit():
    module = OfficialDiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    return module, ModelSpec(
        family="official DiT", shape=(4, 8, 8), variance="learned", guided_channels=3, noise_input="timestep", **PICTURE
    )


def unet():
    return Unet(8, 3, 3, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,)), ModelSpec(
        family="U-Net", shape=(3, 8, 8), **(PICTURE | {"num_classes": 0})
    )


@pytest.fixture(scope="session")
def family_bundle(tmp_path_factory):
    """``family_bundle(make, precision)``: the bundle of a small network whose random weights are of usual size."""
    made = {}

    def bundle_of(make, precision):
        if (make, precision) not in made:
            torch.manual_seed(0)
            module, spec = make()
            with torch.no_grad():
                for parameter in module.parameters():
                    if not parameter.any():
                        torch.nn.init.normal_(parameter, std=0.02)
            out = tmp_path_factory.mktemp("families") / f"{make.__name__}-{precision}.diffx"
            made[make, precision] = diffexport.export(
                module, spec, out, precision=precision, max_batch=4, allow_mismatch=True, thorough=False
            )
        return made[make, precision]

    return bundle_of


@pytest.mark.parametrize(
    ("make", "precision"),
    [
        (official_dit, "fp32"),
        (official_dit, "fp16"),
        (official_dit, "bf16"),
        (unet, "fp16"),
        *(pytest.param(unet, precision, marks=pytest.mark.slow) for precision in ("fp32", "bf16")),
    ],
)
def test_the_engine_computes_in_the_precision_of_the_export(family_bundle, make, precision):
    """A dynamic batch; what the record says is what the network's layers give, not what was asked for."""
    bundle = family_bundle(make, precision)
    graph = "step" if bundle.spec.guidable else "step_plain"
    (built,) = build(bundle, "trt-rtx", targets=["sm89"], batches="1-4", graphs=[graph])
    network = built.engine.record.network
    others = {kind for kind in TYPES.values() if kind != TYPES[precision]}
    assert share(network, precision) > (0.99 if precision == "fp32" else 0.8)
    if precision == "fp32":
        assert not others & {kind for types in network.layers.values() for kind in types}
    # the state, the noise and the row stay fp32 around a half network
    assert {t.dtype for t in (*network.inputs, *network.outputs)} == (
        {"FLOAT", "INT64"} if bundle.spec.conditional else {"FLOAT"}
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_whole_loop_is_an_engine_in_half_precision(family_bundle, precision):
    (built,) = build(
        family_bundle(official_dit, precision), "trt-rtx", targets=["sm89"], batches="4", graphs=["sampler"]
    )
    assert share(built.engine.record.network, precision) > 0.8
