"""What an engine says of itself: ``engine.json`` beside it, written when it is built, read without a GPU.

An engine lies in ``BUNDLE/engines/GRAPH-PRODUCT-DIGEST/``, where the digest is over its key: everything that decides its
bytes. The bundle's manifest does not list engines; each record holds the hashes of the graph and the weights that the
engine was built from, and of the engine itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from diffexport.bundle import MAX_JSON, WEIGHTS, Bundle, FileEntry, Precision, decode_plain, sha256_of
from diffexport.engines.profiles import Profile
from diffexport.errors import EngineError, SpecError
from diffexport.files import read_regular

SCHEMA = 1
FOLDER, RECORD, ENGINE = "engines", "engine.json", "model.engine"


class EngineKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides an engine: two engines of one key have the same bytes."""

    graph: str
    """Name of the bundle's graph."""
    graph_sha256: str
    weights_sha256: str
    precision: Precision
    product: str
    """Import name of the TensorRT that built it."""
    version: str
    targets: tuple[str, ...]
    """Compute capabilities that it runs on, such as sm89."""
    profiles: tuple[Profile, ...]
    sides: dict[str, int]
    """Free dimensions of the graph that are no batches, by name: the sides of a decoder's latents."""
    tf32: bool
    workspace: int | None
    """Most bytes of scratch memory; None for the builder's own limit."""
    level: int | None
    """Optimization level 0 .. 5; None for the builder's own."""

    @property
    def folder(self) -> str:
        """Name of the folder of an engine of this key."""
        digest = hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()
        return f"{self.graph}-{self.product}-{digest[:12]}"


class TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output: name, type as TensorRT calls it, shape with the names of its free dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network definition as the parser made it, which is what the engine computes."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    layers: dict[str, dict[str, int]]
    """Number of layers by kind, then by the type of their result."""
    multiply_adds: dict[str, int]
    """Of products with the network's tensors, by type, for one sample seen once; of every branch of a loop."""


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of an engine."""

    schema: int
    key: EngineKey
    network: Network
    engine: FileEntry
    build_seconds: float
    peak_memory: int
    """Bytes that the building process held at most."""


@dataclass(frozen=True)
class Engine:
    """An engine in its folder."""

    path: Path
    record: EngineRecord

    @property
    def file(self) -> Path:
        return self.path / ENGINE

    def check_file(self) -> None:
        """See that the engine is the one that its record describes.

        Raises:
            EngineError: it is missing or was changed.
        """
        entry = self.record.engine
        if self.file.is_symlink() or not self.file.is_file():
            raise EngineError(f"{self.file}: missing or not a regular file; build again with `diffx build`")
        if self.file.stat().st_size != entry.size or sha256_of(self.file) != entry.sha256:
            raise EngineError(
                f"{self.file}: is not the engine that its record describes; build again with `diffx build`"
            )

    def differences(self, key: EngineKey) -> list[str]:
        """In what this engine is not the one of a key, in words."""
        return differences(self.record.key, key)


_WORDS = {
    "graph_sha256": "another graph",
    "weights_sha256": "other weights",
    "precision": "precision",
    "product": "product",
    "version": "version",
    "targets": "targets",
    "profiles": "batches",
    "sides": "latent sides",
    "tf32": "tf32",
    "workspace": "workspace",
    "level": "level",
}


def differences(built: EngineKey, wanted: EngineKey) -> list[str]:
    """What differs between the key of an engine and the one that is wanted, "version 1.6.0, not 1.7.1"."""
    found = []
    for name, words in _WORDS.items():
        a, b = getattr(built, name), getattr(wanted, name)
        if a != b:
            found.append(words if name.endswith("sha256") else f"{words} {_shown(a)}, not {_shown(b)}")
    return found


def _shown(value: object) -> str:
    if isinstance(value, dict):
        value = tuple(value.values())
    return ",".join(map(str, value)) if isinstance(value, tuple) else "the default" if value is None else str(value)


def is_engine(path: Path) -> bool:
    """Whether a path is an engine's folder or a file in one."""
    return (path / RECORD).is_file() or (path.is_file() and (path.parent / RECORD).is_file())


def read_engine(path: str | Path) -> Engine:
    """An engine by its folder, or by any file in it.

    Raises:
        EngineError: there is no record, or it cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    try:
        record = decode_plain(read_regular(folder / RECORD, MAX_JSON), EngineRecord)
    except OSError as error:
        raise EngineError(
            f"{folder / RECORD}: cannot be read ({error.strerror}); expected an engine made by `diffx build`"
        ) from error
    except (msgspec.DecodeError, SpecError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(f"{folder / RECORD}: not a valid record ({error}); build again with `diffx build`") from error
    if record.schema != SCHEMA:
        raise EngineError(f"{folder / RECORD}: schema version {record.schema}, this diffexport reads {SCHEMA}")
    return Engine(folder, record)


def engines_of(bundle: Bundle) -> tuple[list[Engine], list[str]]:
    """The engines in a bundle in the order of their names, and what is wrong with those that cannot be read."""
    engines, problems = [], []
    try:
        folder = engines_folder(bundle)
    except EngineError as error:
        return [], [str(error)]
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith("."):
            try:
                engines.append(read_engine(_no_link(path)))
            except EngineError as error:
                problems.append(str(error))
    return engines, problems


def engines_folder(bundle: Bundle) -> Path:
    """Where a bundle's engines are; it need not exist.

    Raises:
        EngineError: it is a link, so that engines would be read, written and removed elsewhere.
    """
    return _no_link(bundle.path / FOLDER)


def _no_link(folder: Path) -> Path:
    if folder.is_symlink():
        raise EngineError(f"{folder}: a link, expected a folder in the bundle; remove it")
    return folder


def graph_sha256(bundle: Bundle, graph: str) -> str:
    """The hash of one of a bundle's graphs."""
    return bundle.manifest.files[f"{graph}.onnx"].sha256


def weights_sha256(bundle: Bundle) -> str:
    """The hash of a bundle's weights."""
    return bundle.manifest.files[WEIGHTS].sha256


def stale(bundle: Bundle, engine: Engine) -> str | None:
    """Why an engine is not of this bundle's graphs and weights, or None."""
    key = engine.record.key
    if f"{key.graph}.onnx" not in bundle.manifest.files:
        return f"built from a graph {key.graph!r} that the bundle has not"
    pairs = {
        "another graph": (key.graph_sha256, graph_sha256(bundle, key.graph)),
        "other weights": (key.weights_sha256, weights_sha256(bundle)),
    }
    for words, (built, found) in pairs.items():
        if built != found:
            return f"built from {words}: {built[:12]}..., the bundle has {found[:12]}..."
    return None
