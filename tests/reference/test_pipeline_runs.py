"""Whole sampling runs of diffusers' pipelines, repeated from their saved folders, in float32 with the same start and noise.

The state after every step is compared, relative L2 at most 1e-5, in PyTorch for each setting of a scheduler and from a
bundle for each kind of graph.
"""

import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from refusals import assert_refused
from saved_pipelines import dit, run, save, scheduler, unet
from stepping import relative

import diffexport
from diffexport.backends.onnxruntime import OnnxRuntimeSession
from diffexport.backends.torch import TorchSession
from diffexport.plan import make_plan
from diffexport.sampler import Sampler
from diffexport.schedules import schedule_sigmas
from diffexport_reference.checkpoints import load_checkpoint, read_checkpoint

LIMIT = 1e-5
STEPS = 20

NETWORKS = {
    "unet": unet,
    "unet of learned variance": lambda: unet(out_channels=6),
    "unet of labels": lambda: unet(num_class_embeds=6),
    "dit": dit,
    "dit of eps alone": lambda: dit(out_channels=4),
}
BETAS = np.linspace(1e-3, 0.05, 200).tolist()
DDIM = {"name": "DDIMScheduler"}
LATENT = {"clip_sample": False}
RUNS = {
    "unet": [
        {},
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "sample", "beta_schedule": "sigmoid", "in_double": True},
        {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "timestep_spacing": "linspace"},
        {"trained_betas": BETAS, "num_train_timesteps": 200, "timestep_spacing": "trailing"},
        {"clip_sample_range": 2.0},
        LATENT,
        DDIM,
        {**DDIM, "eta": 0.5},
        {**DDIM, "eta": 1.0, "prediction_type": "v_prediction"},
        {**DDIM, "prediction_type": "sample", "timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
        {**DDIM, **LATENT},
    ],
    "unet of learned variance": [{"variance_type": "learned_range"}],
    "unet of labels": [{**DDIM, **LATENT}],
    "dit": [
        {**DDIM, **LATENT, "w": 4.0},
        {**DDIM, **LATENT, "w": 4.0, "guided": 3},
        {**LATENT, "variance_type": "learned_range", "w": 1.5},
        {**LATENT, "w": 1.5},
    ],
    "dit of eps alone": [{**DDIM, **LATENT, "w": 0.5}],
}
"""Arguments of schedulers; beside them eta, the guidance weight w, the channels that are guided, and in_double: diffusers
keeps alpha_bar in float32, whose 1 - alpha_bar has lost digits near clean data. Where the network predicts clean data that
alone makes 2.5e-5, so the scheduler is given the same table in float64 there."""

CASES = [(name, settings) for name, runs in RUNS.items() for settings in runs]
IN_BUNDLES = [  # what differs in the graph: the clamp, what it keeps, learned variance, guided channels
    ("unet", {}),
    ("unet", DDIM),
    ("unet of learned variance", {"variance_type": "learned_range"}),
    ("dit", {**LATENT, "variance_type": "learned_range", "w": 1.5}),
]


def told(case):
    return ", ".join([case[0], *(f"{k} {v}" if k != "trained_betas" else k for k, v in case[1].items())])


def largest_error(name, settings, folder, open_session):
    """Over the states of one run, those of diffusers beside those of its saved folder."""
    config = dict(settings)
    w, eta, guided = config.pop("w", 1.0), config.pop("eta", None), config.pop("guided", None)
    in_double = config.pop("in_double", False)
    network, process = NETWORKS[name](), scheduler(**config)
    facts = {"null_label": "none"} if "labels" in name else {}
    facts |= {"guidance_channels": guided} if guided else {}
    module, spec = load_checkpoint(save(folder, network, process), **facts)
    if in_double:
        process.alphas_cumprod = torch.from_numpy(1 / (1 + schedule_sigmas(spec.schedule) ** 2))
    labels = [3, 1] if spec.conditional else None
    expected = run(network, process, STEPS, labels, w, guided, eta)
    plan = make_plan(spec, "ddim" if "name" in config else "ddpm", STEPS, w, **({} if eta is None else {"eta": eta}))
    scale = np.append(np.hypot(1, plan.sigmas[1:]), 1.0).astype(np.float32)
    session = open_session(module, spec)
    session.begin(np.float32(plan.x_scale) * expected.start, None if labels is None else np.array(labels))
    errors = []
    for row, z, state, factor in zip(plan.rows.astype(np.float32), expected.noise, expected.states, scale, strict=True):
        session.step(row, z)
        errors.append(relative(session.state()[0] / factor, state))
    return max(errors)


@pytest.mark.parametrize("case", CASES, ids=told)
def test_runs_of_diffusers_in_pytorch(tmp_path, case):
    assert largest_error(*case, tmp_path / "pipeline", TorchSession) <= LIMIT


@pytest.mark.parametrize("case", IN_BUNDLES, ids=told)
def test_runs_of_diffusers_from_a_bundle(tmp_path, case):
    def exported(module, spec):
        return OnnxRuntimeSession(spec, diffexport.export(module, spec, tmp_path / "b.diffx", max_batch=2).path)

    assert largest_error(*case, tmp_path / "pipeline", exported) <= LIMIT


def test_a_ddpm_pipeline_called_as_its_users_call_it(tmp_path):
    network, process = unet(), scheduler()
    pipeline = diffusers.DDPMPipeline(network, process)
    pipeline.set_progress_bar_config(disable=True)
    module, spec = load_checkpoint(save(tmp_path / "ddpm", network, process))
    expected = pipeline(2, torch.manual_seed(0), 50, output_type="pt").images.numpy()
    torch.manual_seed(0)
    draws = torch.stack([torch.randn(2, 3, 8, 8) for _ in range(50)]).numpy()
    noise = np.concatenate([draws[1:], np.zeros_like(draws[:1])])
    sampler = Sampler(spec, TorchSession(module, spec))
    found = sampler.sample(num=2, sampler="ddpm", steps=50, x_init=draws[0], noise=noise)
    assert relative((found / 2 + 0.5).clip(0, 1), expected) <= LIMIT


def test_a_dit_pipeline_called_as_its_users_call_it(diffx, tmp_path, monkeypatch):
    """From the command line, by label names; the pipeline's latents are caught before its VAE."""
    names = {str(k): f"thing {k}" for k in range(1000)} | {"2": "great white shark, white shark, man-eater"}
    names |= {"207": "golden retriever", "134": "crane", "517": "crane"}
    folder = save(tmp_path / "pipe", dit(), scheduler("DDIMScheduler", clip_sample=False), names)
    pipeline = diffusers.DiTPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = []
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: latents.append(z) or SimpleNamespace(sample=z))
    classes = [*pipeline.get_label_ids(["golden retriever", "white shark"]), 3]
    pipeline(classes, guidance_scale=4.0, generator=torch.manual_seed(0), num_inference_steps=25, output_type="pt")
    start = torch.randn((3, 4, 8, 8), generator=torch.manual_seed(0)).numpy()

    status, out, _ = diffx("export", "pipe", "--max-batch", "2")
    assert status == 0
    assert "took the process from scheduler/scheduler_config.json: eps on 1000 ddpm levels, leading steps" in out
    assert read_checkpoint(folder).vae == (folder / "vae").resolve()
    bundle = diffexport.load("pipe.diffx")
    assert bundle.manifest.defaults.sampler == "ddim"
    found = bundle.sampler().sample(["golden retriever", "white shark", 3], steps=25, guidance_scale=4.0, x_init=start)
    assert relative(found, (latents[0] * pipeline.vae.config.scaling_factor).numpy()) <= LIMIT

    words = ("--steps", "2", "--npz", "x.npz", "--out", "x.png")
    assert diffx("sample", "pipe.diffx", "--labels", "golden retriever,3,man-eater", *words)[0] == 0
    assert np.load("x.npz")["labels"].tolist() == [207, 3, 2]
    assert_refused(diffx("sample", "pipe.diffx", "--labels", "crane"), "is a name of labels 134, 517; give the number")
    assert_refused(diffx("sample", "pipe.diffx", "--labels", "golden retreiver"), "near it: golden retriever")
    status, out, _ = diffx("verify", "pipe.diffx", "--against", "pipe")
    assert (status, "every check holds" in out) == (0, True), out


def test_a_wrong_clamp_is_seen(tmp_path):
    """The comparison above fails where a DDIMScheduler's clamp moves the predicted noise, as a DDPMScheduler's does."""
    network, process = unet(), scheduler("DDIMScheduler")
    folder = save(tmp_path / "p", network, process)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"_class_name": "DDPMScheduler"}))
    module, spec = load_checkpoint(folder)
    session = TorchSession(module, spec)
    expected = run(network, process, STEPS)
    plan = make_plan(spec, "ddim", STEPS)
    session.begin(np.float32(plan.x_scale) * expected.start, None)
    for row in plan.rows.astype(np.float32):
        session.step(row)
    assert relative(session.state()[0], expected.states[-1]) > 1e-2
