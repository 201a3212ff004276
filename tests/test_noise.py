"""Noise: published Philox answers, the statistics of the normals, and independence of how they are drawn."""

import json
from pathlib import Path

import numpy as np
import pytest

from diffexport.noise import normal, philox4x32

VECTORS = json.loads((Path(__file__).parent / "vectors" / "noise.json").read_text())


@pytest.mark.parametrize("case", VECTORS["philox4x32_10"], ids=lambda case: case["counter"][0])
def test_philox_gives_the_published_answers(case):
    counter = tuple(np.array([int(word, 16)], np.uint64) for word in case["counter"])
    key = tuple(int(word, 16) for word in case["key"])
    assert [f"{int(word[0]):08x}" for word in philox4x32(counter, key)] == case["out"]


@pytest.mark.parametrize("case", VECTORS["normal"], ids=lambda case: f"seed{case['seed']}-index{case['index']}")
def test_normals_match_the_published_vectors(case):
    z = normal(case["seed"], [case["index"]], [case["draw"]], tuple(case["shape"]))
    np.testing.assert_allclose(z.ravel(), case["values"], rtol=1e-6, atol=1e-7)


def test_normals_follow_the_definition_written_out_in_plain_python():
    """One element of each place in a block, by the formula of the module's docstring, without NumPy's arrays."""
    import math

    seed, index, draw = (7 << 32) + 5, (3 << 32) + 2, 9
    z = normal(seed, [index], [draw], (6,))[0, 0]
    for element in range(6):
        counter = tuple(np.array([word], np.uint64) for word in (element // 4, draw, 2, 3))
        words = [int(word[0]) for word in philox4x32(counter, (5, 7))]
        u, v = ((words[2 * (element % 4 // 2) + k] + 0.5) / 2**32 for k in (0, 1))
        trig = math.cos if element % 2 == 0 else math.sin
        assert z[element] == pytest.approx(math.sqrt(-2 * math.log(u)) * trig(2 * math.pi * v), rel=1e-6)


def test_normals_are_standard_and_uncorrelated():
    z = normal(1, range(400), range(5), (3, 8, 8)).reshape(5, -1).astype(np.float64)
    assert abs(z.mean()) < 0.005
    assert abs(z.std() - 1) < 0.005
    assert abs((z**3).mean()) < 0.02
    assert abs((z**4).mean() - 3) < 0.05
    assert np.abs(np.corrcoef(z) - np.eye(5)).max() < 0.015


def test_a_sample_does_not_depend_on_its_batch_or_on_other_draws():
    whole = normal(3, range(16), range(4), (1, 5, 3))
    alone = normal(3, [11], [2], (1, 5, 3))
    assert np.array_equal(whole[2, 11], alone[0, 0])
    assert np.array_equal(normal(3, range(10, 13), [2], (1, 5, 3))[0, 1], alone[0, 0])


def test_seeds_indices_and_draws_all_matter():
    base = normal(0, [0], [0], (16,))
    for other in (normal(1, [0], [0], (16,)), normal(1 << 32, [0], [0], (16,)), normal(0, [1], [0], (16,))):
        assert not np.array_equal(base, other)
    assert not np.array_equal(base, normal(0, [1 << 32], [0], (16,)))
    assert not np.array_equal(base, normal(0, [0], [1], (16,)))
