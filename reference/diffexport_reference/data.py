"""Data sets: the two toy ones, the digits, folders of images and arrays on disk, all as samples in [-1, 1].

N samples; a sample is (C, H, W) for images and (D,) for points.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from diffexport.errors import DiffexportError

if TYPE_CHECKING:
    from PIL import Image

Layout = Literal["nchw", "nhwc"]
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"))
GREY_MODES = frozenset(("1", "L", "I;16"))
CHANNEL_COUNTS = (1, 3, 4)


class Swissroll(Dataset[Tensor]):
    """N points (2,) along a spiral whose angle runs from ``tmin`` to ``tmin + tmax``, at radius angle/tmax."""

    def __init__(self, tmin: float, tmax: float, N: int) -> None:
        angle = tmin + tmax * torch.linspace(0, 1, N)
        radius = angle / tmax
        self.vals = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)  # (N, 2)

    def __len__(self) -> int:
        return len(self.vals)

    def __getitem__(self, i: int) -> Tensor:
        return self.vals[i]


class TreeDataset(Dataset[tuple[Tensor, int]]):
    """Points (2,) along the paths of a tree, from its root at the origin to leaves on the unit circle.

    The label of a point is the leaf that its path leads to, ``total_leaves = branching_factor**depth`` of them. A
    node of level l lies at radius l/depth, in the mean direction of its leaves, so paths share their first branches.
    """

    def __init__(self, branching_factor: int = 4, depth: int = 3, num_samples_per_path: int = 30) -> None:
        self.total_leaves = branching_factor**depth
        leaf = torch.arange(self.total_leaves)
        nodes = [torch.zeros(self.total_leaves, 2)]
        for level in range(1, depth + 1):
            leaves_below = branching_factor ** (depth - level)
            first = leaf // leaves_below * leaves_below
            angle = 2 * torch.pi * (first + (leaves_below - 1) / 2) / self.total_leaves
            nodes.append(level / depth * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1))
        corners = torch.stack(nodes, dim=1)  # (leaves, depth + 1, 2)
        t = torch.linspace(0, depth, num_samples_per_path)  # position along a path, in levels
        level_of = t.long().clamp(max=depth - 1)
        part = (t - level_of)[:, None]
        points = corners[:, level_of] * (1 - part) + corners[:, level_of + 1] * part  # (leaves, samples, 2)
        self.vals = points.reshape(-1, 2)
        self.labels = leaf.repeat_interleave(num_samples_per_path)

    def __len__(self) -> int:
        return len(self.vals)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.vals[i], int(self.labels[i])


class MappedDataset(Dataset[Any]):
    """A data set with ``fn`` applied to each item, when the item is asked for."""

    def __init__(self, dataset: Any, fn: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.fn = fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        return self.fn(self.dataset[i])


def img_train_transform(image: Any) -> Tensor:
    """A Pillow image, (H, W) or (H, W, C) uint8 array, flipped left to right half of the time: (C, H, W) in [-1, 1]."""
    x = _pixels(image)
    return x.flip(-1) if torch.rand(()) < 0.5 else x


def img_normalize(x: Tensor) -> Tensor:
    """Samples in [-1, 1] as pixels in [0, 1]; what lies outside is clamped."""
    return ((x + 1) / 2).clamp(0, 1)


class Samples(Protocol):
    """What training needs of samples: how many, and one of them, float32."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Tensor: ...


@dataclass(frozen=True)
class LoadedData:
    """A data set that is ready to train on."""

    name: str
    samples: Samples
    """(N, *shape) float32, images in [-1, 1]; a tensor, or an ``ImageFiles`` that reads as it is asked."""
    labels: Tensor | None
    """(N,) int64, or None without labels."""
    label_names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 without."""
        if self.labels is None:
            return 0
        return max(len(self.label_names), int(self.labels.max()) + 1)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The samples (B, *shape) and labels (B,) at ``indices`` (B,)."""
        if isinstance(self.samples, Tensor):
            x = self.samples[indices]
        else:
            x = torch.stack([self.samples[i] for i in indices.tolist()])
        return x, None if self.labels is None else self.labels[indices]


class ImageFiles(Dataset[Tensor]):
    """Images on disk, each read when it is asked for: (C, H, W) float32 in [-1, 1].

    With ``image_size`` an image is resized so that its shorter side fits, and the middle square is taken. What is
    transparent becomes white.
    """

    def __init__(self, paths: Sequence[Path], channels: int, image_size: int | None) -> None:
        self.paths = tuple(paths)
        self.channels = channels
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        from PIL import Image, ImageOps

        with _opened(self.paths[i]) as image:
            if image.mode == "I;16":  # Pillow would clip 16 bits to 255, not scale them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if self.channels == 1 else "RGB")
        if self.image_size is not None:
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.LANCZOS)
        return _pixels(image)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file; whatever Pillow cannot read of it, also in the block, is an error that names it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DiffexportError(f"{path}: not a readable image ({e}); remove it or replace it") from e


def load_data(name_or_path: str | Path, *, image_size: int | None = None, layout: Layout | None = None) -> LoadedData:
    """A data set by name or from a path.

    Args:
        name_or_path: "digits" (scikit-learn's 1,797 handwritten digits, (1, 8, 8)), "swissroll", "tree", a folder of
            images (subfolders are classes), or a .npz or .npy file. An array is images (N, H, W), (N, C, H, W) or
            (N, H, W, C), uint8 or floats in [0, 1] or [-1, 1], or points (N, D). A .npz names it ``x``, ``images`` or
            ``arr_0``, and its integer labels, if any, ``labels`` or ``y``.
        image_size: side to which the digits are resized, or the images of a folder are resized and cropped.
        layout: order of the axes of an array of images, where its shape leaves that open.

    Raises:
        DiffexportError: nothing by this name, or something that cannot be trained on.
    """
    name = str(name_or_path)
    path = Path(name_or_path)
    if image_size is not None and image_size < 1:
        raise DiffexportError(f"image size {image_size}: expected at least 1")
    if image_size is not None and name != "digits" and not path.is_dir():
        raise DiffexportError(f"{name}: --image-size is for digits and folders of images; this data has its own size")
    if layout is not None and path.suffix not in (".npz", ".npy"):
        raise DiffexportError(f"{name}: --layout is for .npz and .npy files only")
    if name == "digits":
        return _digits(image_size)
    if name in _NAMED:
        return _NAMED[name]()
    if path.is_dir():
        return _load_folder(path, image_size)
    if path.suffix in (".npz", ".npy"):
        return _load_array(path, layout)
    found = "not a folder, .npz or .npy file" if path.exists() else "no such file or folder"
    raise DiffexportError(
        f"data {name!r}: {found}; expected digits, {', '.join(_NAMED)}, a folder of images, .npz or .npy"
    )


def _digits(side: int | None) -> LoadedData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise DiffexportError("the digits need scikit-learn; run: pip install 'diffexport[train]'") from e
    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) 0..16
    x = torch.tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    if side is not None:
        x = interpolate(x, size=(side, side), mode="bilinear")
    return LoadedData("digits", x, torch.tensor(labels, dtype=torch.int64), tuple("0123456789"), (1, *x.shape[2:]))


def _swissroll() -> LoadedData:
    return LoadedData("swissroll", Swissroll(np.pi / 2, 5 * np.pi, 1000).vals, None, (), (2,))


def _tree() -> LoadedData:
    tree = TreeDataset()
    return LoadedData("tree", tree.vals, tree.labels, (), (2,))


_NAMED: dict[str, Callable[[], LoadedData]] = {"swissroll": _swissroll, "tree": _tree}


def _load_folder(folder: Path, image_size: int | None) -> LoadedData:
    visible = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    loose = [p for p in visible if _is_image(p)]
    by_class = {p.name: sorted(filter(_is_image, p.rglob("*"))) for p in visible if p.is_dir()}
    by_class = {name: paths for name, paths in by_class.items() if paths}
    if loose and by_class:
        raise DiffexportError(
            f"{folder}: {len(loose)} images beside subfolders of images; "
            "move them into a subfolder, or train on one folder without subfolders"
        )
    paths = loose or [p for paths in by_class.values() for p in paths]
    if not paths:
        raise DiffexportError(f"{folder}: no images in it; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    channels, shape = _common_shape(paths, image_size)
    labels = None
    if by_class:
        labels = torch.cat([torch.full((len(p),), i) for i, p in enumerate(by_class.values())])
    return LoadedData(str(folder), ImageFiles(paths, channels, image_size), labels, tuple(by_class), shape)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")


def _common_shape(paths: Sequence[Path], image_size: int | None) -> tuple[int, tuple[int, int, int]]:
    """Channels and shape of all images, from their headers alone; colour where one of them has colour."""
    grey = True
    size: tuple[int, int] | None = None
    for path in paths:
        with _opened(path) as image:
            grey = grey and image.mode in GREY_MODES
            found = image.size
        if image_size is None and size is not None and found != size:
            raise DiffexportError(
                f"{path}: {found[0]}x{found[1]}, but {paths[0].name} is {size[0]}x{size[1]}; "
                "give --image-size to resize and crop all of them"
            )
        size = found
    assert size is not None
    channels = 1 if grey else 3
    width, height = size if image_size is None else (image_size, image_size)
    return channels, (channels, height, width)


def _load_array(path: Path, layout: Layout | None) -> LoadedData:
    x, labels, names = _read_array(path)
    if x.ndim == 2:
        return LoadedData(str(path), _points(path, x), labels, names, x.shape[1:])
    images = _as_nchw(path, x, layout)
    samples = torch.from_numpy(np.ascontiguousarray(_to_unit_range(path, images)))
    return LoadedData(str(path), samples, labels, names, tuple(samples.shape[1:]))


def _read_array(path: Path) -> tuple[NDArray[Any], Tensor | None, tuple[str, ...]]:
    """The samples, labels and label names of a file, checked against one another."""
    try:
        with open(path, "rb") as file:
            content = np.load(file, allow_pickle=False)
            arrays = dict(content) if path.suffix == ".npz" else {"x": content}
    except FileNotFoundError:
        raise DiffexportError(f"{path}: no such file") from None
    except Exception as e:  # NumPy has a different exception for every kind of damage
        raise DiffexportError(f"{path}: not a readable {path.suffix} file ({e})") from e
    keys = [k for k in ("x", "images", "arr_0") if k in arrays]
    if not keys:
        raise DiffexportError(f"{path}: holds {', '.join(arrays) or 'nothing'}; expected the images as 'x' or 'images'")
    x = arrays[keys[0]]
    if x.ndim not in (2, 3, 4) or x.size == 0:
        raise DiffexportError(
            f"{path}: shape {x.shape}; expected images (N, H, W[, C]) or (N, C, H, W), or points (N, D)"
        )
    label_keys = [k for k in ("labels", "y") if k in arrays]
    labels = _check_labels(path, arrays[label_keys[0]], len(x)) if label_keys else None
    names = tuple(str(name) for name in arrays.get("label_names", ()))
    if labels is not None and names and len(names) <= int(labels.max()):
        raise DiffexportError(f"{path}: {len(names)} label names, but a label {int(labels.max())}")
    return x, labels, names if labels is not None else ()


def _check_labels(path: Path, labels: NDArray[Any], count: int) -> Tensor:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DiffexportError(
            f"{path}: labels {labels.shape} {labels.dtype}; expected integers ({count},), one a sample"
        )
    if labels.min() < 0 or labels.max() >= count:
        raise DiffexportError(f"{path}: labels {labels.min()}..{labels.max()}; expected classes numbered from 0")
    return torch.from_numpy(labels.astype(np.int64))


def _points(path: Path, x: NDArray[Any]) -> Tensor:
    if x.dtype.kind not in "fiu" or not np.isfinite(x).all():
        raise DiffexportError(f"{path}: points of type {x.dtype}; expected finite numbers")
    return torch.from_numpy(x.astype(np.float32))


def _as_nchw(path: Path, x: NDArray[Any], layout: Layout | None) -> NDArray[Any]:
    if x.ndim == 3:
        return x[:, None]
    fits = {"nchw": x.shape[1] in CHANNEL_COUNTS, "nhwc": x.shape[3] in CHANNEL_COUNTS}
    if layout is None:
        if all(fits.values()) or not any(fits.values()):
            raise DiffexportError(f"{path}: shape {x.shape} may be NCHW or NHWC; say which with --layout nchw or nhwc")
        layout = "nchw" if fits["nchw"] else "nhwc"
    return x if layout == "nchw" else x.transpose(0, 3, 1, 2)


def _to_unit_range(path: Path, x: NDArray[Any]) -> NDArray[np.float32]:
    """Pixels in [-1, 1]. Floats without a negative value are taken to be in [0, 1]."""
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(127.5) - 1
    if x.dtype.kind == "f":
        low, high = float(x.min()), float(x.max())
        if low >= -1 and high <= 1:  # false for NaN too
            scaled = x.astype(np.float32)
            return scaled if low < 0 else scaled * 2 - 1
        raise DiffexportError(f"{path}: values {low:g}..{high:g}; expected uint8, or floats in [0, 1] or [-1, 1]")
    raise DiffexportError(f"{path}: type {x.dtype}; expected uint8, or floats in [0, 1] or [-1, 1]")


def _pixels(image: Any) -> Tensor:
    """A Pillow image or uint8 array (H, W) or (H, W, C) as (C, H, W) float32 in [-1, 1]."""
    pixels = np.asarray(image)
    if pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    if pixels.dtype != np.uint8:
        raise DiffexportError(f"an image of type {pixels.dtype}; expected 8 bits a channel, such as mode L or RGB")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1)
