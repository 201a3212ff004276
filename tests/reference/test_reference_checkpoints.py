"""Every form of checkpoint that is read, every fact that is asked for, and every file that is refused."""

import argparse
import json
import pickle

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from recorded import ORACLES, Recorded, close, names

from diffexport.errors import CheckpointError, SpecError
from diffexport.schedules import DEFAULT_SCHEDULES, Schedule
from diffexport.spec import ModelSpec
from diffexport_reference import IdealDenoiser, OfficialDiT
from diffexport_reference.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from diffexport_reference.families import FAMILIES, Shapes, recognise

DDPM = DEFAULT_SCHEDULES["ddpm"]
FACTS = {"prediction": "eps", "scaled": False, "schedule": "ddpm"}
NEEDED = {"DiT": "heads", "Unet": "image_size"}


def facts_of(case):
    """The flags that the weights of a recorded case need."""
    facts = dict(FACTS)
    if case["arch"] == "DiT":
        facts["heads"] = case["num_heads"]
    if case["arch"] == "Unet":
        facts["image_size"] = case["in_dim"]
    return {} if case["arch"] == "official DiT" else facts


def inputs(recorded):
    level = recorded.get("t") if recorded.case["arch"] == "official DiT" else recorded["sigma"].expand(3)
    label = recorded.get("y") if recorded.case["arch"] == "official DiT" else recorded.get("cond")
    return (recorded["x"], level, *([] if label is None else [label]))


SMALLDIFFUSION = [
    n for arch in ("DiT", "Unet", "TimeInputMLP", "ConditionalMLP") for n in names(arch) if n.endswith("_plain")
]
BARE = [*SMALLDIFFUSION, "sd_dit_time_flow"]


@pytest.fixture
def tiny():
    """A bare state dict of an MLP."""
    return safetensors.torch.load_file(ORACLES / "sd_mlp.safetensors")


def saved(tmp_path, content, name="model.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bare_weights_of_smalldiffusion_as_recorded(tmp_path, name, suffix):
    recorded = Recorded(name)
    path = recorded.weights
    if suffix == ".pt":
        path = saved(tmp_path, safetensors.torch.load_file(path))
    found = read_checkpoint(path, **facts_of(recorded.case))
    assert close(found.module(*inputs(recorded)), recorded["forward"])
    assert found.spec.shape == tuple(recorded["x"].shape[1:])
    assert found.spec.num_classes == recorded.case.get("num_classes", 0)
    assert (found.spec.prediction, found.spec.scaled, found.spec.schedule) == ("eps", False, DDPM)
    assert not found.module.training
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in found.module.parameters())
    assert found.notes == ()
    json.dumps(found.spec.architecture)


@pytest.mark.parametrize("name", names("official DiT"))
def test_bare_weights_of_the_official_dit_as_recorded(name):
    recorded = Recorded(name)
    module, spec = load_checkpoint(recorded.weights, heads=recorded.case["num_heads"])
    assert close(module(*inputs(recorded)), recorded["forward"])
    assert spec.family == "official DiT"
    assert (spec.prediction, spec.schedule, spec.scaled, spec.clip) == ("eps", DDPM, True, None)
    assert (spec.noise_input, spec.unit_start, spec.spacing, spec.guided_channels) == ("timestep", True, "respaced", 3)
    assert spec.variance == ("learned" if recorded.case.get("learn_sigma", True) else "large")
    assert spec.num_classes == recorded.case["num_classes"]


def test_width_tells_the_heads_of_published_sizes(tmp_path):
    args = {"input_size": 4, "hidden_size": 384, "depth": 1, "num_heads": 6, "num_classes": 3}
    path = saved(tmp_path, OfficialDiT(**args).state_dict())
    assert load_checkpoint(path)[1].architecture["num_heads"] == 6
    assert load_checkpoint(path, heads=4)[1].architecture["num_heads"] == 4


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize(("depth", "width", "heads"), [(28, 1152, 16), (24, 1024, 16), (12, 768, 12), (12, 384, 6)])
def test_tensors_tell_all_of_the_twelve_published_sizes(depth, width, heads, patch, learn_sigma):
    """And of any latent side and number of classes; shapes alone, since the largest has 675 M parameters."""
    args = {"input_size": 8 * patch, "patch_size": patch, "in_channels": 4, "hidden_size": width, "depth": depth}
    args |= {"num_heads": heads, "mlp_ratio": 4.0, "num_classes": 7 * patch, "learn_sigma": learn_sigma}
    with torch.device("meta"):
        tensors = OfficialDiT(**args).state_dict()
    family = recognise(tensors)
    assert (family.name, family.read(Shapes({k: tuple(v.shape) for k, v in tensors.items()}), {})) == (
        "official DiT",
        args,
    )


def snapshot(tmp_path, **more):
    args = {"input_size": 4, "hidden_size": 384, "depth": 1, "num_heads": 6, "num_classes": 3}
    model, ema = OfficialDiT(**args), OfficialDiT(**args)
    for network, value in ((model, 1.0), (ema, 2.0)):
        torch.nn.init.constant_(network.final_layer.linear.bias, value)
    options = argparse.Namespace(model="DiT-S/2", image_size=32, num_classes=3)
    content = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": {"state": {}}, "args": options, **more}
    return saved(tmp_path, content)


@pytest.mark.parametrize(("weights", "value"), [(None, 2.0), ("ema", 2.0), ("model", 1.0)])
def test_snapshot_of_training_gives_the_average_or_what_is_asked_for(tmp_path, weights, value):
    found = read_checkpoint(snapshot(tmp_path), weights=weights)
    assert (found.module.final_layer.linear.bias == value).all()
    assert f"took the weights {weights or 'ema'!r}" in found.notes[0]


def test_weights_that_are_not_there_cannot_be_chosen(tmp_path, tiny):
    with pytest.raises(SpecError, match="--weights best: this file holds ema and model"):
        load_checkpoint(snapshot(tmp_path), weights="best")
    with pytest.raises(SpecError, match="--weights ema: this file holds one set"):
        load_checkpoint(saved(tmp_path, tiny), weights="ema", **FACTS)


@pytest.mark.parametrize("prefix", ["module.", "ema_model.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_are_removed_and_said(tmp_path, tiny, prefix):
    path = saved(tmp_path, {prefix + key: value for key, value in tiny.items()})
    found = read_checkpoint(path, **FACTS)
    assert any("removed the prefix" in note for note in found.notes)
    assert torch.equal(found.module.net[0].weight, tiny["net.0.weight"])


def test_an_average_beside_its_source_is_taken(tmp_path, tiny):
    both = {f"ema_model.{k}": v for k, v in tiny.items()} | {f"online_model.{k}": v * 0 for k, v in tiny.items()}
    found = read_checkpoint(saved(tmp_path, both), **FACTS)
    assert torch.equal(found.module.net[0].weight, tiny["net.0.weight"])
    assert "left 8 others" in found.notes[0]


@pytest.mark.parametrize("name", ["sd_dit_cond", "sd_unet_cond", "sd_mlp_cond"])
def test_first_releases_without_an_mlp_after_the_labels(tmp_path, name):
    state = safetensors.torch.load_file(ORACLES / f"{name}.safetensors")
    state = {key: value for key, value in state.items() if not key.startswith("cond_embed.mlp")}
    facts = {"sd_dit_cond": {"heads": 2}, "sd_unet_cond": {"image_size": 12}}.get(name, {})
    module, spec = load_checkpoint(saved(tmp_path, state), **facts, **FACTS)
    out = module(torch.zeros(2, *spec.shape), torch.ones(2), torch.tensor([0, 1]))
    assert out.shape == (2, *spec.shape)
    assert not torch.equal(out[0], out[1])


def test_a_flow_model_leaves_no_choice_of_schedule_and_scaling():
    path = Recorded("sd_dit_cond_flow").weights
    spec = load_checkpoint(path, heads=2, prediction="flow")[1]
    assert (spec.schedule, spec.scaled) == (DEFAULT_SCHEDULES["flow"], False)
    with pytest.raises(SpecError, match="never scaled"):
        load_checkpoint(path, heads=2, prediction="flow", scaled=True)
    with pytest.raises(SpecError, match="flow schedule"):
        load_checkpoint(path, heads=2, prediction="flow", schedule="ddpm")


def test_all_missing_facts_are_named_in_one_line():
    with pytest.raises(SpecError) as error:
        load_checkpoint(ORACLES / "sd_dit.safetensors")
    message = str(error.value)
    for part in ("sd_dit.safetensors: ", "--heads N, a divisor of the width 48", "--prediction eps|x0|v|flow"):
        assert part in message
    for part in ("--scaled or --no-scaled", "--schedule ddpm|ldm|sigmoid|cosine|loglinear|flow", "sd_dit.json"):
        assert part in message
    assert "\n" not in message
    with pytest.raises(SpecError, match=r"--image-size N, a multiple of 4 pixels, --schedule"):
        load_checkpoint(ORACLES / "sd_unet_cond.safetensors", prediction="eps", scaled=True)


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        ("sd_dit", {"heads": 5}, "--heads 5: does not divide the width 48"),
        ("sd_dit", {"heads": 0}, "--heads 0: expected at least 1"),
        ("sd_dit", {"heads": 3, "image_size": 16}, "--image-size 16: this checkpoint says 8"),
        ("sd_dit", {"heads": 3, "prediction": "noise"}, "--prediction noise: expected one of eps, x0, v, flow"),
        ("sd_dit", {"heads": 3, "schedule": "edm"}, "--schedule edm: expected one of ddpm, ldm"),
        ("sd_unet", {"image_size": 9}, "image side 9: .* multiple of 2"),
        ("sd_mlp", {"heads": 3}, "--heads 3: this checkpoint has no such thing"),
        ("official_dit", {"heads": 4, "prediction": "v"}, "--prediction v: this checkpoint says eps"),
        ("official_dit", {"heads": 4, "schedule": "ldm"}, r"--schedule ldm .* says ddpm \(0.0001 to 0.02, N 1000\)"),
    ],
)
def test_facts_that_cannot_be_are_refused(file, flags, message):
    with pytest.raises(SpecError, match=message):
        load_checkpoint(ORACLES / f"{file}.safetensors", **({} if file == "official_dit" else FACTS) | flags)


def test_facts_from_the_file_beside_and_flags_win(tmp_path):
    path = saved(tmp_path, safetensors.torch.load_file(ORACLES / "sd_dit_cond.safetensors"), "dit.pt")
    schedule = {"kind": "loglinear", "N": 200, "start": 0.005, "end": 10.0}
    facts = {"heads": 4, "prediction": "v", "scaled": True, "schedule": schedule, "label_names": list("abcdefghij")}
    (tmp_path / "dit.json").write_text(json.dumps({**facts, "loss": [0.1], "batch": 3}))
    found = read_checkpoint(path, heads=2)
    assert found.module.blocks[0].attn.num_heads == 2
    assert found.spec.prediction == "v"
    assert found.spec.schedule == Schedule(**schedule)
    assert found.spec.label_names == tuple("abcdefghij")
    assert found.notes == ("took prediction, scaled, schedule, label_names from dit.json",)
    assert read_checkpoint(path, heads=2, schedule=DDPM).spec.schedule == DDPM


@pytest.mark.parametrize("text", ["{", "[1]", '{"heads": "two"}', '{"schedule": "edm"}', '{"scaled": 1}'])
def test_a_bad_file_beside_is_named(tmp_path, tiny, text):
    path = saved(tmp_path, tiny, "mlp.pt")
    (tmp_path / "mlp.json").write_text(text)
    with pytest.raises(SpecError, match=r"mlp\.pt: mlp\.json beside it: "):
        load_checkpoint(path, **FACTS)


# diffexport's own checkpoints


def own(tmp_path, name="sd_dit_cond_scaled_v", half=False, **changed):
    recorded = Recorded(name)
    case = recorded.case
    left_out = ("arch", "modifier", "family", "schedule", "steps", "weights", "attn_resolutions")
    args = {key: value for key, value in case.items() if key not in left_out}
    if case["arch"] == "Unet":
        args["attn_resolutions"] = [16, *case["attn_resolutions"]]
    spec = ModelSpec(
        family="mine",
        shape=tuple(recorded["x"].shape[1:]),
        prediction="v",
        scaled=True,
        schedule=DDPM,
        num_classes=case.get("num_classes", 0),
    )
    state = recorded.network().state_dict()
    if half:
        state = {key: value.half() for key, value in state.items()}
    path = tmp_path / "own.pt"
    given = {"model_class": case["arch"], "args": args, "spec": spec, "state_dict": state, "training": {"seed": 0}}
    save_checkpoint(path, **given | changed)
    return recorded, spec, path


@pytest.mark.parametrize("name", SMALLDIFFUSION)
def test_own_checkpoint_comes_back(tmp_path, name):
    recorded, spec, path = own(tmp_path, name)
    found = read_checkpoint(path)
    assert close(found.module(*inputs(recorded)), recorded["forward"])
    assert msgspec.structs.replace(found.spec, architecture={}) == spec
    assert msgspec.convert(json.loads(msgspec.json.encode(found.spec)), ModelSpec) == found.spec
    assert [p.name for p in tmp_path.iterdir()] == ["own.pt"]


def test_own_checkpoint_in_half_comes_back_in_single(tmp_path):
    recorded, _, path = own(tmp_path, name="sd_dit_cond_plain", half=True)
    module, _ = load_checkpoint(path)
    assert module.final_linear.weight.dtype == torch.float32
    assert close(module(*inputs(recorded)), recorded["forward"], 2e-3)


def test_own_checkpoint_of_an_ideal_denoiser(tmp_path):
    data = torch.randn(7, 1, 2, 2)
    spec = ModelSpec(family="ideal denoiser", shape=(1, 2, 2), prediction="eps", schedule=DDPM)
    state = IdealDenoiser(data).state_dict()
    path = tmp_path / "ideal.pt"
    save_checkpoint(path, model_class="IdealDenoiser", args={}, spec=spec, state_dict=state, training={})
    module, _ = load_checkpoint(path)
    x = torch.randn(2, 1, 2, 2)
    assert torch.equal(module(x, torch.ones(2)), IdealDenoiser(data)(x, torch.ones(2)))
    assert load_checkpoint(saved(tmp_path, state), schedule="ddpm")[1].shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"heads": 1}, "--heads 1: this checkpoint says 2"),
        ({"image_size": 16}, "--image-size 16: this checkpoint says 8"),
        ({"prediction": "eps"}, "--prediction eps: this checkpoint says v"),
        ({"scaled": False}, "--scaled/--no-scaled False: this checkpoint says True"),
        ({"schedule": "ldm"}, "--schedule ldm"),
        ({"weights": "ema"}, "--weights ema"),
    ],
)
def test_flags_against_an_own_checkpoint_are_refused(tmp_path, flags, message):
    path = own(tmp_path)[2]
    load_checkpoint(path, heads=2, image_size=8, prediction="v", scaled=True, schedule="ddpm")
    with pytest.raises(SpecError, match=message):
        load_checkpoint(path, **flags)


def _without_block(state):
    return {key: value for key, value in state.items() if not key.startswith("blocks.1.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=9), "version 9 of the format, this diffexport reads 1"),
        (lambda c: c.pop("spec"), "is damaged .KeyError: 'spec'"),
        (lambda c: c["spec"].update(prediction="noise"), "is damaged"),
        (lambda c: c["spec"].update(shape=[3, 8, 8]), "says shape .3, 8, 8., its weights say .1, 8, 8."),
        (lambda c: c["spec"].update(num_classes=4), "says num_classes 4, its weights say 10"),
        (lambda c: c["model"].update({"class": "GAN"}), "model class 'GAN' is not known here; known are DiT, Unet"),
        (lambda c: c["model"]["args"].update(depth=10**9), "says depth 1000000000, its weights say 2"),
        (lambda c: c["model"]["args"].update(num_heads=5), "is damaged .* does not divide the width 32"),
        (lambda c: c["model"]["args"].pop("num_heads"), "is damaged .*--heads"),
        (lambda c: c.update(state_dict=_without_block(c["state_dict"])), "says depth 2, its weights say 1"),
        (lambda c: c["state_dict"].pop("final_linear.bias"), "looks like a DiT, but final_linear.bias is missing"),
    ],
)
def test_a_damaged_own_checkpoint_is_refused(tmp_path, change, message):
    path = own(tmp_path)[2]
    content = torch.load(path)
    change(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(saved(tmp_path, content))
    assert "\n" not in str(error.value)


def test_save_checkpoint_leaves_the_old_file_when_it_fails(tmp_path):
    path = own(tmp_path)[2]
    before = path.read_bytes()
    with pytest.raises(TypeError):
        own(tmp_path, training={"loss": np.float32(1)})
    with pytest.raises(CheckpointError, match="model class 'GAN'"):
        own(tmp_path, model_class="GAN")
    assert path.read_bytes() == before
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(
            tmp_path / "taken" / "x.pt",
            model_class="IdealDenoiser",
            args={},
            spec=ModelSpec(family="x", shape=(1,), prediction="eps", schedule=DDPM),
            state_dict={},
            training={},
        )


# files that are refused


class Evil:
    def __reduce__(self):
        return (print, ("code that ran",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys, tiny):
    for protocol, content in ((2, Evil()), (2, {"a": Evil(), **tiny}), (4, Evil())):
        torch.save(content, tmp_path / "evil.pt", pickle_protocol=protocol)
        (tmp_path / "raw.pt").write_bytes(pickle.dumps(content, protocol=protocol))
        for name in ("evil.pt", "raw.pt"):
            with pytest.raises(CheckpointError) as error:
                load_checkpoint(tmp_path / name)
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 300 + len(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"evil\.pt: refused: reading it could run code \(it asks for .*print"):
        load_checkpoint(saved(tmp_path, Evil(), "evil.pt"))
    with pytest.raises(
        CheckpointError, match=r"refused: .* asks for torch\.nn\.modules\.linear\.Linear\); save the state"
    ):
        load_checkpoint(saved(tmp_path, torch.nn.Linear(1, 1)))
    assert "code that ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_refused(tmp_path, tiny, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(tiny, path)
    else:
        safetensors.torch.save_file(tiny, path)
    whole = path.read_bytes()
    for part in (b"", whole[:1], whole[:100], whole[: len(whole) // 2], whole[:-1], b"\x00" * 500, b"not a checkpoint"):
        path.write_bytes(part)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path, **FACTS)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: no such file"):
        load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_old_files_without_an_archive_are_read(tmp_path, tiny):
    torch.save(tiny, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    module, _ = load_checkpoint(tmp_path / "old.bin", **FACTS)
    assert torch.equal(module.net[0].weight, tiny["net.0.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a state dict"),
        (torch.zeros(2), "holds a Tensor, expected a state dict"),
        ({}, "holds nothing; expected a state dict"),
        ({"epoch": 3, "loss": 0.1}, "holds epoch, loss; expected a state dict"),
        (
            {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)},
            "begin with a.weight, b.weight; known are DiT, U-Net",
        ),
        ({"model": {"unet.conv.weight": torch.zeros(2)}}, "not a model that is known here"),
    ],
)
def test_what_is_no_known_model_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved(tmp_path, content), **FACTS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("net.2.weight", float("nan"), "net.2.weight holds NaN or infinite values"),
        ("net.2.weight", float("inf"), "net.2.weight holds NaN or infinite values"),
        ("net.0.bias", torch.zeros(16, dtype=torch.int64), "net.0.bias is of type torch.int64, expected floats"),
        ("net.0.bias", torch.zeros(16, dtype=torch.complex64), "net.0.bias is of type torch.complex64"),
        ("net.0.bias", torch.zeros(0), r"net.0.bias is empty, of shape \(0,\)"),
        ("net.0.bias", torch.zeros(16, device="meta"), "net.0.bias was saved without values"),
        ("net.0.bias", 3, "net.0.bias is an int, expected a tensor"),
        ("net.0.bias", torch.zeros(1).expand(10**9, 10**9), r"net.0.bias claims the shape \(1000000000, 1000000000\)"),
        ("net.0.bias", torch.zeros(17), r"net.0.bias has shape \(17,\), expected \(16,\)"),
        ("net.0.weight", torch.zeros(16), r"net.0.weight has shape \(16,\), expected 2 dimensions"),
        ("net.6.weight", torch.zeros(3, 16), "takes points of 2 numbers and returns 3"),
        ("net.9.weight", torch.zeros(3, 3), "looks like an MLP, but net.9.weight is not expected"),
        ("net.2.bias", None, "looks like an MLP, but net.2.bias is missing"),
    ],
)
def test_unsound_weights_are_refused_by_name(tmp_path, tiny, name, value, message):
    if isinstance(value, float):
        tiny[name][0, 0] = value
    elif value is None:
        del tiny[name]
    else:
        tiny[name] = value
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(saved(tmp_path, tiny), **FACTS)
    assert "\n" not in str(error.value)


def test_weights_of_another_float_type_come_back_in_single(tmp_path, tiny):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        path = saved(tmp_path, {key: value.to(dtype) for key, value in tiny.items()})
        module, _ = load_checkpoint(path, **FACTS)
        assert torch.equal(module.net[0].weight, tiny["net.0.weight"].to(dtype).float())


def test_every_family_is_recognised_by_its_own_name():
    assert (
        len({family.name for family in FAMILIES}) == len({family.model_class for family in FAMILIES}) == len(FAMILIES)
    )


def _renamed(state, old, new):
    return {name.replace(old, new): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "official_dit",
            lambda s: {k: v for k, v in s.items() if "blocks.1" not in k} | {"head.weight": torch.zeros(1)},
            "looks like an official DiT, but head.weight is not expected",
        ),
        (
            "official_dit",
            lambda s: _renamed(s, "pos_embed", "position"),
            "looks like an official DiT, but pos_embed is missing; position is not expected",
        ),
        (
            "sd_dit_cond",
            lambda s: _renamed(s, "attn.qkv", "attention.in"),
            "looks like a DiT, but blocks.0.attn.qkv.weight, blocks.0.attn.qkv.bias, blocks.1.attn.qkv.weight (and 1 more) "
            "are missing; blocks.0.attention.in.bias, blocks.0.attention.in.weight, blocks.1.attention.in.bias (and 1 "
            "more) are not expected",
        ),
        (
            "sd_unet",
            lambda s: _renamed(_renamed(_renamed(s, "downs.", "encoder."), "ups.", "decoder."), "mid.", "middle."),
            "the nearest is a U-Net, but downs.0.blocks.0.0.layer1.0.weight, downs.0.blocks.0.0.layer1.0.bias",
        ),
    ],
)
def test_half_matching_weights_name_the_nearest_family_and_what_differs(tmp_path, file, change, message):
    state = change(safetensors.torch.load_file(ORACLES / f"{file}.safetensors"))
    facts = {"official_dit": {"heads": 4}, "sd_dit_cond": {**FACTS, "heads": 2}}.get(file, FACTS)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(saved(tmp_path, state), **facts)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("asked", "channels"), [(None, 3), ("all", None), (2, 2), ("4", None)])
def test_guidance_acts_on_the_channels_that_are_asked_for(tmp_path, asked, channels):
    path = tmp_path / "dit.pt"
    torch.save(safetensors.torch.load_file(ORACLES / "official_dit.safetensors"), path)
    assert load_checkpoint(path, heads=4, guidance_channels=asked)[1].guided_channels == channels
    if asked:
        (tmp_path / "dit.json").write_text(json.dumps({"guidance_channels": asked, "heads": 4}))
        assert load_checkpoint(path)[1].guided_channels == channels


@pytest.mark.parametrize(
    ("file", "facts", "message"),
    [
        (
            "official_dit",
            {"heads": 4, "guidance_channels": 5},
            "--guidance-channels 5: this model has 4; expected 1..4",
        ),
        (
            "official_dit",
            {"heads": 4, "guidance_channels": 0},
            "--guidance-channels 0: this model has 4; expected 1..4",
        ),
        (
            "official_dit",
            {"heads": 4, "guidance_channels": "rgb"},
            "--guidance-channels rgb: expected all, or a number",
        ),
        ("official_dit", {"heads": 4, "null_label": "last"}, "--null-label last: this checkpoint has no such thing"),
        ("sd_mlp", {**FACTS, "guidance_channels": "all"}, "--guidance-channels all: this model cannot be guided"),
    ],
)
def test_guidance_that_cannot_be_is_refused(file, facts, message):
    with pytest.raises(SpecError, match=message):
        load_checkpoint(ORACLES / f"{file}.safetensors", **facts)
