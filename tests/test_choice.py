"""The backend that is taken where none is named."""

import json

import pytest
from refusals import assert_refused

import diffexport.choice
from diffexport.choice import choose


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def speeds(monkeypatch):
    """Speeds in place of measurements, with a count of how often each was asked for."""
    table = {"ort": 0.002, "openvino": 0.001}
    asked = []

    def speed(bundle, name):
        asked.append(name)
        if name not in table:
            raise OSError(f"{name} is not here")
        return table[name]

    monkeypatch.setattr(diffexport.choice, "_speed", speed)
    return table, asked


def test_the_fastest_is_chosen_and_remembered(toy_bundle, cache, speeds):
    table, asked = speeds
    first = choose(toy_bundle("plain"))
    assert first.backend == "openvino"
    assert "openvino 1 ms, ort 2 ms" in first.why
    table["ort"] = 0.0001
    asked.clear()
    assert choose(toy_bundle("plain")) == first
    assert asked == []
    assert choose(toy_bundle("variance")).backend == "ort", "another kind of bundle has a choice of its own"
    for path in cache.rglob("choice.json"):
        path.write_text("{")
    assert choose(toy_bundle("plain")).backend == "ort", "a damaged choice is made anew"


def test_a_backend_that_fails_its_golden_cases_is_not_chosen(toy_bundle, cache, monkeypatch):
    import copy

    bundle = copy.copy(toy_bundle("plain"))
    assert choose(bundle).backend in ("ort", "openvino")
    cases = bundle.golden()
    cases["step.1.x_next"] = cases["step.1.x_next"] + 1
    monkeypatch.setattr(type(bundle), "golden", lambda self: cases)
    with pytest.raises(diffexport.DiffexportError, match="ort: golden step 1, x_next differs from PyTorch's"):
        diffexport.choice._measured(bundle, ["ort", "openvino"])


def test_options_narrow_the_choice(toy_bundle, cache, speeds):
    speeds[0]["ort"] = 0.0001
    assert choose(toy_bundle("plain")).backend == "ort"
    assert choose(toy_bundle("plain"), ["precision"]).backend == "openvino"
    assert choose(toy_bundle("plain"), ["threads"]).backend == "ort"


def test_the_command_says_what_was_chosen(toy_bundle, diffx, cache):
    path = toy_bundle("plain").path
    status, out, _ = diffx("sample", path, "--num", "1")
    assert status == 0
    assert "was chosen: the fastest here a golden step (" in out
    report = json.loads(diffx("sample", path, "--num", "1", "--json")[1])
    assert report["backend"] in ("ort", "openvino")
    assert report["chosen"].startswith("the fastest here")
    assert "chosen" not in diffx("sample", path, "--num", "1", "--backend", "ort")[1]
    assert_refused(diffx("sample", path, "--checkpoint", "nothing.pt"), "nothing.pt")
