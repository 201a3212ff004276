"""Every name of TensorRT's API that this code uses is in the bindings of each version, and takes what it is given.

``tests/vectors/tensorrt_api.json`` holds what the bindings of full TensorRT say, which cannot run where there is no GPU;
``scripts/tensorrt-api`` wrote it from their published wheels. Those of TensorRT for RTX are asked themselves.
"""

import json

import pytest
import tensorrt_rtx
from tensorrt_names import ROOT, _find, signatures, takes, used

from diffexport.engines.network import _PRODUCTS, TYPES

RECORDED = json.loads((ROOT / "tests" / "vectors" / "tensorrt_api.json").read_text())
BINDINGS = {**RECORDED, f"rtx {tensorrt_rtx.__version__}": signatures(tensorrt_rtx)}

RTX_ONLY = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.DISABLED",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ICudaEngine.create_runtime_config",  # in TensorRT since 10.8, without a strategy for graphs
    "IRuntimeConfig.cuda_graph_strategy",
}
"""Used only where the product has them."""


def test_the_names_are_read_off_the_sources():
    names = used()
    assert names["Builder.create_network"] == {1}
    assert names["IExecutionContext.set_tensor_address"] == {2}
    assert names["IOptimizationProfile.set_shape"] == {4}
    assert names["IProgressMonitor.phase_start"] == {3}
    assert {"BuilderFlag.TF32", "ILogger.Severity.ERROR", "Runtime.deserialize_cuda_engine", "OnnxParser"} <= set(names)
    assert set(names) >= RTX_ONLY
    assert len(names) > 60


@pytest.mark.parametrize("version", BINDINGS)
def test_every_name_is_in_the_bindings(version):
    missing = set(used()) - set(BINDINGS[version])
    assert missing <= (set() if version.startswith("rtx") else RTX_ONLY)


@pytest.mark.parametrize("version", BINDINGS)
def test_every_call_fits_a_signature(version):
    bindings, checked = BINDINGS[version], 0
    for name, counts in used().items():
        for count in counts if name in bindings else ():
            if bindings[name]:
                assert any(takes(signature, count) for signature in bindings[name]), (name, count, bindings[name])
                checked += 1
    assert checked >= 25


def test_a_wrong_call_would_be_seen():
    assert takes("self: IExecutionContext, name: str, shape: tuple", 2)
    assert not takes("self: IExecutionContext, name: str, shape: tuple", 1)
    assert not takes("self: IExecutionContext, name: str, shape: typing.List[int]", 3)
    assert takes("self: Builder, flags: int = 0", 0)
    assert takes("self: X, a: Callable[[int, int], None], b: int = 3", 1)
    assert _find(tensorrt_rtx, "BuilderFlag.FP16") is None  # gone in RTX and in 11: what other projects still set


def test_kinds_and_types_have_these_names():
    assert all(hasattr(tensorrt_rtx.LayerType, kind) for kind in _PRODUCTS)
    assert all(hasattr(tensorrt_rtx.DataType, kind) for kind in TYPES.values())
