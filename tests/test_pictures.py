"""Pictures: pixel values, layout, and that what was asked for is what the file is."""

import numpy as np
import pytest
from PIL import Image

from diffexport.errors import ShapeError
from diffexport.pictures import Frame, grid, points, save_samples, save_trajectory, strip, to_pixels


def test_pixels_span_the_range_and_are_clipped():
    x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5], np.float32).reshape(1, 1, 2, 3)
    assert to_pixels(x)[0, ..., 0].ravel().tolist() == [0, 0, 128, 255, 255, 191]
    colour = np.stack([np.full((2, 2), value, np.float32) for value in (-1.0, 0.0, 1.0)])[None]
    assert to_pixels(colour)[0, 0, 0].tolist() == [0, 128, 255]


def test_latents_are_stretched_so_that_something_is_seen():
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32) * 7
    pixels = to_pixels(x)
    assert pixels.shape == (2, 8, 8, 3)
    assert pixels.min((0, 1, 2)).tolist() == [0, 0, 0]
    assert pixels.max((0, 1, 2)).tolist() == [255, 255, 255]


def test_a_grid_enlarges_small_samples_and_has_a_place_for_each():
    x = np.full((5, 1, 8, 8), -1, np.float32)
    x[3] = 1
    page = np.asarray(grid(x, columns=3))
    assert page.shape == (2 * 68 + 4, 3 * 68 + 4, 3)
    assert page[68 + 4 + 32, 4 + 32].tolist() == [255] * 3  # the fourth, first of the second row
    assert page[4 + 32, 4 + 32].tolist() == [0] * 3


def test_captions_stand_above_a_column_once():
    x = np.zeros((6, 1, 8, 8), np.float32)
    plain = grid(x, columns=3).height
    assert grid(x, list("abcabc"), columns=3).height == plain + 16
    assert grid(x, list("abcdef"), columns=3).height == plain + 32


def test_points_and_trajectories_are_written(tmp_path):
    rng = np.random.default_rng(0)
    save_samples(rng.standard_normal((50, 2)).astype(np.float32), tmp_path / "p.png")
    assert np.asarray(Image.open(tmp_path / "p.png")).min() < 100
    frames = [Frame(float(10 - k), *rng.standard_normal((2, 4, 1, 8, 8)).astype(np.float32)) for k in range(10)]
    save_trajectory(frames, tmp_path / "t.gif", "gif")
    with Image.open(tmp_path / "t.gif") as picture:
        assert (picture.format, picture.n_frames) == ("GIF", 10)
    save_trajectory(frames, tmp_path / "t.png", "png")
    assert strip(frames, samples=2).width == 10 * 68 + 4


@pytest.mark.parametrize("shape", [(4, 3), (4,)])
def test_what_cannot_be_drawn_is_said(shape):
    with pytest.raises(ShapeError, match="needs samples of shape"):
        (points if len(shape) == 2 else grid)(np.zeros(shape, np.float32))
