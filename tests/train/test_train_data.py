"""Data sets: every form that `diffx train` takes, on files that the test makes, and what it says to bad ones."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import assert_refused

from diffexport.errors import DiffexportError
from diffexport_reference.data import (
    MappedDataset,
    Swissroll,
    TreeDataset,
    img_normalize,
    img_train_transform,
    load_data,
)


@pytest.fixture
def pixels(rng):
    return rng.integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)  # (N, H, W, C)


def _first(data):
    return data.batch(torch.tensor([0]))[0][0]


def test_the_swissroll_is_the_closed_form():
    roll = Swissroll(math.pi / 2, 5 * math.pi, 11)
    assert len(roll) == 11
    torch.testing.assert_close(roll[0], torch.tensor([0.0, 0.1]))
    assert torch.linalg.vector_norm(roll[10]).item() == pytest.approx(1.1)


def test_the_tree_leads_from_the_root_to_the_unit_circle():
    tree = TreeDataset(branching_factor=3, depth=2, num_samples_per_path=5)
    assert (tree.total_leaves, len(tree)) == (9, 45)
    path = torch.stack([tree[i][0] for i in range(5)])
    assert [tree[i][1] for i in (0, 4, 5, 44)] == [0, 0, 1, 8]
    torch.testing.assert_close(path[0], torch.zeros(2))
    assert torch.linalg.vector_norm(path, dim=1).tolist()[2::2] == pytest.approx([0.5, 1.0])
    torch.testing.assert_close(tree[2][0], tree[7][0])  # the first branch is shared by its leaves


def test_transforms_of_images():
    grey = np.array([[0, 255], [51, 102]], np.uint8)
    seen = {tuple(img_train_transform(Image.fromarray(grey)).flatten().tolist()) for _ in range(64)}
    assert len(seen) == 2  # as it is, and flipped
    assert img_train_transform(grey).shape == (1, 2, 2)
    x = MappedDataset([grey], lambda item: img_normalize(img_train_transform(item) * 2))[0]
    assert (x.min(), x.max()) == (0, 1)
    assert len(MappedDataset([grey], img_normalize)) == 1
    assert img_train_transform(Image.new("1", (2, 2), 1)).unique().tolist() == [1]
    with pytest.raises(DiffexportError, match="type float64; expected 8 bits"):
        img_train_transform(np.zeros((2, 2)))


def test_the_digits():
    data = load_data("digits")
    assert (len(data.samples), data.shape, data.num_classes) == (1797, (1, 8, 8), 10)
    assert data.label_names == tuple("0123456789")
    x, labels = data.batch(torch.arange(1797))
    assert (x.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max()) == (-1, 1)


@pytest.mark.parametrize(("name", "classes"), [("swissroll", 0), ("tree", 64)])
def test_points_by_name(name, classes):
    data = load_data(name)
    assert (data.shape, data.num_classes) == ((2,), classes)
    assert data.batch(torch.tensor([1, 2]))[0].shape == (2, 2)


def test_a_folder_with_classes_is_read_lazily(tmp_path, pixels):
    for i, image in enumerate(pixels):
        folder = tmp_path / ("cat" if i < 2 else "dog") / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    data = load_data(tmp_path)
    assert (data.shape, data.label_names, data.labels.tolist()) == ((3, 6, 7), ("cat", "dog"), [0, 0, 1, 1, 1])
    torch.testing.assert_close(_first(data), torch.tensor(pixels[0] / 127.5 - 1).permute(2, 0, 1).float())
    assert load_data(tmp_path, image_size=4).batch(torch.tensor([0, 4]))[0].shape == (2, 3, 4, 4)
    data.samples.paths[0].write_bytes(b"no image")
    with pytest.raises(DiffexportError, match="not a readable image"):
        _first(data)


def test_a_folder_without_classes_keeps_grey_grey(tmp_path, pixels):
    for i, image in enumerate(pixels[..., 0]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    data = load_data(tmp_path)
    assert (data.shape, data.labels, data.num_classes) == ((1, 6, 7), None, 0)
    torch.testing.assert_close(_first(data)[0], torch.tensor(pixels[0, ..., 0] / 127.5 - 1).float())
    transparent = Image.new("RGBA", (7, 6), (0, 0, 0, 0))
    transparent.save(tmp_path / "0.png")
    assert (_first(load_data(tmp_path)) == 1).all()  # white, in colour now


def test_an_image_of_absurd_size_is_refused(tmp_path, diffx):
    """200 kB that would unfold to 200 million pixels, named by its header, or found when it is drawn."""
    (tmp_path / "pictures").mkdir()
    Image.new("1", (20_000, 10_000)).save(tmp_path / "pictures" / "a.png")
    result = diffx("train", "pictures", "--image-size", 8, "--out", "a.pt", "--steps", 1)
    assert_refused(result, "a.png: not a readable image (Image size (200000000 pixels) exceeds limit of")
    Image.new("1", (8, 8)).save(tmp_path / "pictures" / "a.png")
    data = load_data(tmp_path / "pictures", image_size=8)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "pictures" / "a.png")
    with pytest.raises(DiffexportError, match="exceeds limit"):
        _first(data)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 128 << 8, np.uint16)).save(tmp_path / "a.png")
    assert _first(load_data(tmp_path)).unique().item() == pytest.approx(128 / 127.5 - 1, abs=1e-6)


@pytest.mark.parametrize("key", ["x", "images", "arr_0"])
@pytest.mark.parametrize("labels", ["labels", "y"])
def test_npz_of_every_name(tmp_path, pixels, key, labels):
    np.savez(tmp_path / "a.npz", **{key: pixels, labels: np.arange(5, dtype=np.uint8)})
    data = load_data(tmp_path / "a.npz")
    assert (data.shape, data.labels.tolist()) == ((3, 6, 7), [0, 1, 2, 3, 4])
    torch.testing.assert_close(_first(data), torch.tensor(pixels[0] / 127.5 - 1).permute(2, 0, 1).float())


def test_npy_of_every_layout_and_range(tmp_path, pixels):
    want = torch.tensor(pixels / 127.5 - 1).permute(0, 3, 1, 2).float()
    forms = [
        pixels,
        pixels.transpose(0, 3, 1, 2),
        pixels / 255,
        (pixels / 127.5 - 1).astype(np.float32),
    ]
    for array in forms:
        np.save(tmp_path / "a.npy", array)
        torch.testing.assert_close(load_data(tmp_path / "a.npy").batch(torch.arange(5))[0], want)
    np.save(tmp_path / "a.npy", pixels[..., 0])
    assert load_data(tmp_path / "a.npy").shape == (1, 6, 7)
    np.save(tmp_path / "a.npy", np.full((4, 2), 3.0))
    assert _first(load_data(tmp_path / "a.npy")).tolist() == [3, 3]


def test_a_layout_that_is_open_has_to_be_said(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 3, 5, 3), np.uint8))
    with pytest.raises(DiffexportError, match="--layout nchw or nhwc"):
        load_data(tmp_path / "a.npy")
    assert load_data(tmp_path / "a.npy", layout="nchw").shape == (3, 5, 3)
    assert load_data(tmp_path / "a.npy", layout="nhwc").shape == (3, 3, 5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 4, 4), np.int64)}, "type int64; expected uint8, or floats"),
        ({"x": np.full((3, 4, 4), 255.0)}, "values 255..255; expected uint8, or floats"),
        ({"x": np.full((3, 4, 4), np.nan)}, "values nan..nan"),
        ({"x": np.full((3, 2), np.inf)}, "expected finite numbers"),
        ({"x": np.zeros((3, 4, 4, 4, 4))}, "expected images"),
        ({"x": np.zeros((0, 4, 4))}, "expected images"),
        ({"pictures": np.zeros((3, 4, 4))}, "holds pictures; expected the images as 'x' or 'images'"),
        ({"x": np.zeros((3, 4, 4)), "y": np.zeros(3)}, "expected integers"),
        ({"x": np.zeros((3, 4, 4)), "y": np.zeros(2, int)}, "one a sample"),
        ({"x": np.zeros((3, 4, 4)), "y": np.array([-1, 0, 1])}, "numbered from 0"),
        ({"x": np.zeros((3, 4, 4)), "y": np.array([0, 0, 1]), "label_names": np.array(["a"])}, "1 label names"),
        ({"x": np.array([{"code": 1}])}, "not a readable .npz file"),
    ],
)
def test_arrays_that_cannot_be_trained_on(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DiffexportError, match=message):
        load_data(tmp_path / "a.npz")


def test_digits_are_resized_when_asked():
    small, large = load_data("digits"), load_data("digits", image_size=16)
    assert large.shape == (1, 16, 16)
    x, y = _first(small)[0].numpy(), _first(large)[0].numpy()
    places = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)  # linear between the middles of the pixels
    rows = np.array([np.interp(places, np.arange(8), column) for column in x.T]).T
    expected = np.array([np.interp(places, np.arange(8), row) for row in rows])
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_files_that_cannot_be_trained_on(tmp_path, pixels):
    def fails(message, path, **options):
        with pytest.raises(DiffexportError, match=message) as caught:
            load_data(path, **options)
        assert "\n" not in str(caught.value)

    fails("no such file or folder; expected digits, swissroll, tree", "digit")
    fails("no such file", tmp_path / "missing.npz")
    fails("no images in it", tmp_path)
    fails("--image-size is for digits and folders", "swissroll", image_size=16)
    fails("--layout is for", "digits", layout="nchw")
    fails("expected at least 1", tmp_path, image_size=0)
    (tmp_path / "notes.txt").write_text("")
    fails("not a folder, .npz or .npy file", tmp_path / "notes.txt")
    whole = io.BytesIO()
    np.savez(whole, x=pixels)
    (tmp_path / "cut.npz").write_bytes(whole.getvalue()[:200])
    fails("not a readable .npz file", tmp_path / "cut.npz")
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    Image.fromarray(pixels[0, :3]).save(tmp_path / "b.png")
    fails("give --image-size", tmp_path)
    (tmp_path / "b.png").write_bytes(b"no image")
    fails("b.png: not a readable image", tmp_path)
    (tmp_path / "class").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "class" / "c.png")
    fails("beside subfolders of images", tmp_path)
