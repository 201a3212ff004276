"""Whole sampling runs of the two upstream code bases, repeated with this project's plans on each backend.

The plan says everything of prediction, scaling and sampler, so all runs of one weight file go through one bundle.
"""

import re

import numpy as np
import pytest
import safetensors.torch
import torch
from recorded import BUILDERS, NOT_ARGUMENTS, ORACLES, Recorded, names

import diffexport
from diffexport.backends.onnxruntime import OnnxRuntimeSession
from diffexport.backends.torch import TorchSession
from diffexport.plan import make_plan
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import ModelSpec

LIMIT = 1e-5


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def bare_network(case):
    """The network without modifiers: its class, arguments and weights as recorded."""
    cls, make = BUILDERS[case["arch"]]
    network = make(cls, **{name: value for name, value in case.items() if name not in NOT_ARGUMENTS})
    network.load_state_dict(safetensors.torch.load_file(ORACLES / case["weights"]))
    return network.eval()


def smalldiffusion_spec(case, network):
    modifier = case["modifier"].split("_")
    prediction = next((name for name in ("x0", "v", "flow") if name in modifier), "eps")
    return ModelSpec(
        family=case["arch"],
        shape=tuple(network.input_dims),
        prediction=prediction,
        scaled="scaled" in modifier,
        schedule=DEFAULT_SCHEDULES[case["schedule"]],
        num_classes=case.get("num_classes", 0),
    )


def official_spec(case, network):
    return ModelSpec(
        family="official DiT",
        shape=tuple(network.input_dims),
        prediction="eps",
        scaled=True,
        schedule=DEFAULT_SCHEDULES["ddpm"],
        num_classes=case["num_classes"],
        noise_input="timestep",
        unit_start=True,
        spacing="respaced",
        guided_channels=3,
        variance="learned" if case.get("learn_sigma", True) else "large",
    )


def follow(session, plan, start, label, noise, trajectory, scale=None):
    """The largest relative error of the state after each row; ``scale`` takes the state to upstream's space."""
    session.begin(start, label)
    errors = []
    for index, (row, z, expected) in enumerate(zip(plan.rows.astype(np.float32), noise, trajectory, strict=True)):
        session.step(row, z)
        found = session.state()[0]
        errors.append(relative(found if scale is None else found * scale[index], expected))
    return max(errors)


def smalldiffusion_runs(session, recorded, spec):
    """Error of every recorded run, by name."""
    errors = {}
    for key in recorded.arrays:
        found = re.fullmatch(r"samples\.gam(.+)\.mu(.+)\.cfg(.+)\.traj", key)
        if not found:
            continue
        gam, mu, cfg = map(float, found.groups())
        steps = recorded.case["steps"]
        plan = make_plan(spec, "accelerated", steps, 1 + cfg if spec.conditional else 1.0, gam=gam, mu=mu)
        x, noise, trajectory = (recorded[key.replace("traj", part)].numpy() for part in ("xt", "noise", "traj"))
        label = recorded["cond"].numpy() if spec.conditional else None
        errors[key] = follow(session, plan, x, label, noise, trajectory)
    return errors


SMALLDIFFUSION = [name for arch in ("DiT", "Unet", "TimeInputMLP", "ConditionalMLP") for name in names(arch)]


@pytest.mark.parametrize("name", SMALLDIFFUSION)
def test_smalldiffusion_runs_in_pytorch(name):
    recorded = Recorded(name)
    network = bare_network(recorded.case)
    spec = smalldiffusion_spec(recorded.case, network)
    errors = smalldiffusion_runs(TorchSession(network, spec), recorded, spec)
    assert errors
    assert max(errors.values()) <= LIMIT, errors


@pytest.mark.parametrize("weights", sorted({Recorded(name).case["weights"] for name in SMALLDIFFUSION}))
def test_smalldiffusion_runs_from_a_bundle(weights, tmp_path):
    cases = [recorded for recorded in map(Recorded, SMALLDIFFUSION) if recorded.case["weights"] == weights]
    network = bare_network(cases[0].case)
    spec = smalldiffusion_spec(cases[0].case, network)
    bundle = diffexport.export(network, spec, tmp_path / "b.diffx", max_batch=3)
    for recorded in cases:
        session = OnnxRuntimeSession(spec, bundle.path)
        errors = smalldiffusion_runs(session, recorded, smalldiffusion_spec(recorded.case, network))
        assert errors
        assert max(errors.values()) <= LIMIT, (recorded.name, errors)


def official_runs(session, recorded, spec):
    errors = {}
    for loop, sampler in (("loop.8", "ddpm"), ("loop.ddim8", "ddim")):
        z, noise, trajectory, steps = (recorded[f"{loop}.{k}"].numpy() for k in ("z", "noise", "traj", "timesteps"))
        plan = make_plan(spec, sampler, 8, recorded.case["cfg_scale"])
        np.testing.assert_allclose(np.sort(plan.rows[:, 1]), np.sort(steps), atol=1e-9)
        scale = np.append(1 / np.hypot(1, plan.sigmas[1:]), 1.0)  # to the variance-preserving state
        start, label = np.float32(plan.x_scale) * z, recorded["y"].numpy()
        errors[loop] = follow(session, plan, start, label, noise, trajectory, scale)
    return errors


@pytest.mark.parametrize("name", names("official DiT"))
def test_official_dit_runs(name, tmp_path):
    recorded = Recorded(name)
    network = bare_network(recorded.case)
    spec = official_spec(recorded.case, network)
    errors = official_runs(TorchSession(network, spec), recorded, spec)
    assert max(errors.values()) <= LIMIT, errors
    bundle = diffexport.export(network, spec, tmp_path / "b.diffx", max_batch=2, allow_mismatch=True)
    errors = official_runs(OnnxRuntimeSession(spec, bundle.path), recorded, spec)
    assert max(errors.values()) <= LIMIT, errors


def test_ideal_denoiser_run(tmp_path):
    """The one model whose true answer is known, through a graph that holds its data set as a constant."""
    from diffexport_reference import IdealDenoiser

    recorded = Recorded("sd_ideal")
    network = IdealDenoiser(list(recorded["data"])).eval()
    sigmas = recorded["sigmas"].numpy().astype(np.float64)
    spec = ModelSpec(
        family="ideal", shape=(2,), prediction="eps", schedule=DEFAULT_SCHEDULES["loglinear"], num_classes=0
    )  # fmt: skip
    bundle = diffexport.export(network, spec, tmp_path / "b.diffx", max_batch=2, allow_mismatch=True)
    plan = make_plan(spec, "accelerated", grid=sigmas.tolist())
    trajectory = recorded["traj"].numpy()
    start = torch.from_numpy(trajectory[0])
    for _ in range(100):  # where the run began was not recorded; its first step, solved for that, contracts
        start = recorded["traj"][0] - float(sigmas[1] - sigmas[0]) * network(start, torch.tensor(sigmas[:1]))
    for session in (TorchSession(network, spec), OnnxRuntimeSession(spec, bundle.path)):
        assert follow(session, plan, start.numpy(), None, [None] * len(plan), trajectory) <= LIMIT


def test_a_wrong_weight_is_seen():
    recorded = Recorded("sd_dit_cond_scaled_v")
    network = bare_network(recorded.case)
    spec = smalldiffusion_spec(recorded.case, network)
    with torch.no_grad():
        network.final_linear.weight[0, 0] += 0.01
    assert max(smalldiffusion_runs(TorchSession(network, spec), recorded, spec).values()) > LIMIT
