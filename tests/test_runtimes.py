"""The graphs of a bundle in the runtimes that have no backend yet: OpenVINO runs them."""

import numpy as np
import openvino
import pytest

from diffexport.backends.onnxruntime import run_graph
from diffexport.noise import normal
from diffexport.parity import relative_l2
from diffexport.plan import make_plan
from diffexport.probes import mixing_row, probe_levels, probe_state

GRAPHS = ["step", "step_plain", "denoiser", "sampler"]
NAMES = ["plain", "variance", "flow", "unguided", "points"]
CASES = [*((name, graph) for name in NAMES for graph in GRAPHS), ("decoded", "decoder"), ("decoded", "sampler_decoded")]


def inputs(spec, batch):
    """Something for every input that a graph can have, by name."""
    sigma = float(probe_levels(spec)[2])
    start = probe_state(spec, sigma, 0, range(batch))
    plan = make_plan(spec, "heun", 4, 2.0 if spec.guidable else 1.0)
    return {
        "x": start.x,
        "h": start.h,
        "z": start.z,
        "label": start.label,
        "row": mixing_row(spec, sigma, 2.0 if spec.guidable else 1.0),
        "sigma": np.full(batch, sigma, np.float32),
        "guidance": np.full(batch, 2.0, np.float32),
        "x_init": start.x,
        "plan": plan.rows.astype(np.float32),
        "noise": normal(0, range(batch), range(len(plan)), spec.shape),
    }


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_openvino_runs_every_graph(toy_bundle, name, graph):
    bundle = toy_bundle(name)
    compiled = openvino.Core().compile_model(bundle.graph(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3):
        feeds = inputs(bundle.spec, batch)
        # a port also carries the names of values inside that are the same
        found = compiled({port: feeds[name] for port in compiled.inputs for name in port.get_names() & set(feeds)})
        expected = run_graph(bundle.graph(graph), {key: value for key, value in feeds.items() if value is not None})
        for port, result in zip(compiled.outputs, found.values(), strict=True):
            (output,) = port.get_names() & set(expected)
            assert relative_l2(result, expected[output]) < 1e-5
