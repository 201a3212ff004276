"""The bundle: the folder ``NAME.diffx/`` that an export writes and every runtime reads.

    manifest.json       what the model is and every other file with its size and sha256
    weights.bin         the weights, external data that all graphs share
    step.onnx           (x, h, z, label, row) -> (x', h'), guidance inside
    step_plain.onnx     the same without guidance, for rows with w = 1
    denoiser.onnx       (x, sigma, label, guidance) -> D
    sampler.onnx        (x_init, label, plan, noise) -> x, the whole loop in one call
    decoder.onnx        x -> image, of models of latents that were exported with a decoder
    sampler_decoded.onnx  (x_init, label, plan, noise) -> image, x: label to image in one call, with a decoder
    conditioning.onnx   (c_noise, label) -> condition: what depends on them alone, for all rows at once
    step_conditioned.onnx, step_plain_conditioned.onnx     the steps with condition in the label's place
    branch.onnx         (x, condition, row) -> out: the network for one half of a guided batch
    update.onnx         (x, h, z, row, cond, uncond) -> (x', h'): what a guided step does after both halves
    plans.safetensors   ready-made plans for runtimes without Python
    golden.safetensors  golden cases: recorded inputs and PyTorch's outputs
    certificate.json    what was measured against PyTorch, with the manifest's sha256

The certificate vouches for the manifest and the manifest for every other file, so a change anywhere is seen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from diffexport.errors import BundleError, SpecError
from diffexport.files import read_regular
from diffexport.onnx_file import check_graph
from diffexport.plan import Plan, make_plan
from diffexport.precision import Precision as Precision
from diffexport.spec import DecoderSpec, ModelSpec

if TYPE_CHECKING:
    from diffexport.sampler import Sampler

SCHEMA = 1
SUFFIX = ".diffx"
MANIFEST, CERTIFICATE = "manifest.json", "certificate.json"
WEIGHTS, PLANS, GOLDEN = "weights.bin", "plans.safetensors", "golden.safetensors"
GRAPHS = ("step", "step_plain", "denoiser", "sampler")
DECODER_GRAPHS = ("decoder", "sampler_decoded")
CONDITIONED_GRAPHS = ("conditioning", "step_conditioned", "step_plain_conditioned")
BRANCH_GRAPHS = ("branch", "update")
"""Of models that can be guided, beside the conditioned ones."""

CPU_GRAPHS = CONDITIONED_GRAPHS + BRANCH_GRAPHS
"""Those that only sessions on a CPU run."""


MAX_JSON = 1 << 26
MAX_TENSORS = 1 << 29
"""Most bytes of a JSON file, and of the plans or golden cases, that are read; weights are left to the runtime."""

MAX_BATCH = 1 << 16

HALF: tuple[Precision, ...] = ("fp16", "bf16")
Tensors = dict[str, NDArray[Any]]
_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle as it was when written."""

    size: int
    sha256: str


class Defaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run uses where its user says nothing."""

    sampler: str
    steps: int = 20
    guidance_scale: float = 1.0
    batch: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= MAX_BATCH:
            raise SpecError(f"batch {self.batch}: expected 1..{MAX_BATCH}")

    def plan(
        self,
        spec: ModelSpec,
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> Plan:
        """A plan for a model, with these settings where None is given. See ``diffexport.plan.make_plan``."""
        return make_plan(
            spec,
            self.sampler if sampler is None else sampler,
            self.steps if steps is None else steps,
            self.guidance_scale if guidance_scale is None else guidance_scale,
            **options,
        )


class Decoder(DecoderSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The decoder of a bundle."""

    parameters: int
    source: str
    """sha256 over the names and values of its weights."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is in a bundle."""

    schema: int
    name: str
    model: ModelSpec
    precision: Precision
    keep_fp32: tuple[str, ...] = ()
    """Layers of a half or int8 bundle that were kept fp32 beyond what is kept in every model."""
    parameters: int
    max_batch: int
    widest: int | None = None
    """Numbers of one sample in the largest value inside the network, by which CPUs cut large batches; None if unknown."""
    defaults: Defaults
    source: str
    """sha256 over the names and values of the weights that were exported."""
    files: dict[str, FileEntry]
    tools: dict[str, str]
    """Versions of what made the graphs."""
    decoder: Decoder | None = None
    """What makes images of the samples, where these are latents."""

    def __post_init__(self) -> None:
        if not (self.name.isprintable() and self.name == Path(self.name).name and self.name.strip(".")):
            raise SpecError(f"name {self.name!r}: expected a plain file name")
        if not 1 <= self.max_batch <= MAX_BATCH:
            raise SpecError(f"max_batch {self.max_batch}: expected 1..{MAX_BATCH}")
        if self.widest is not None and self.widest < 1:
            raise SpecError(f"widest {self.widest}: expected at least 1")

    @property
    def graphs(self) -> tuple[str, ...]:
        """The names of the bundle's graphs."""
        on_cpu = tuple(graph for graph in CPU_GRAPHS if f"{graph}.onnx" in self.files)
        return GRAPHS + on_cpu + (DECODER_GRAPHS if self.decoder is not None else ())


class Measurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One comparison with PyTorch and the limit that it was held to."""

    check: str
    batch: int
    relative_l2: float
    max_abs: float
    limit: float
    psnr: float | None = None
    """Of the final image, dB over the range of PyTorch's result; None for single steps and exact equality."""
    passed: bool


class LayerError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a layer costs when it alone is int8."""

    layer: str
    relative_l2: float
    """Of the network's output, over states of the model's own sampler."""
    kept: bool
    """Whether it stays fp32."""


class Quantization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the layers of an int8 bundle were chosen."""

    budget: float
    """PSNR in dB that every compared run had to reach; layers were kept fp32, the costliest first, until it did."""
    layers: list[LayerError]
    """Every layer that could be int8, the costliest first."""


class Certificate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured of a bundle against PyTorch when it was written."""

    manifest_sha256: str
    backend: str
    precision: Precision
    passed: bool
    measurements: list[Measurement]
    quantization: Quantization | None = None
    """Of an int8 bundle."""


class Bundle:
    """An opened bundle, whose files have been checked against its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.model

    @property
    def digest(self) -> str:
        """sha256 over the names and contents of all files: the same wherever the bundle lies."""
        listed = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(self.manifest.files.items()))
        return hashlib.sha256(listed.encode()).hexdigest()

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle, check every file against the manifest, and see that its graphs ask for nothing outside it.

        Raises:
            BundleError: it is missing, of another schema version, or a file is missing, altered or not to be trusted.
        """
        path = Path(path)
        if not path.is_dir():
            what = "not a folder" if path.exists() else "no such folder"
            raise BundleError(f"{path}: {what}; expected a bundle made by `diffx export`")
        manifest = _decode(path / MANIFEST, Manifest)
        for name, entry in manifest.files.items():
            _check_file(path, name, entry)
        missing = [
            name
            for name in (WEIGHTS, PLANS, GOLDEN, *(f"{g}.onnx" for g in manifest.graphs))
            if name not in manifest.files
        ]
        if missing:
            raise BundleError(f"{path}: the manifest does not list {missing[0]}; export the model again")
        for name in manifest.files:
            if name.endswith(".onnx"):
                check_graph(path / name, path / WEIGHTS)
        return cls(path, manifest)

    def graph(self, name: str) -> Path:
        """The path of one of ``Manifest.graphs``."""
        return self.path / f"{name}.onnx"

    def certificate(self) -> Certificate:
        """What was measured when the bundle was written.

        Raises:
            BundleError: it is missing, or it vouches for another manifest than this one.
        """
        certificate = _decode(self.path / CERTIFICATE, Certificate)
        found = sha256_of(self.path / MANIFEST)
        if certificate.manifest_sha256 != found:
            raise BundleError(
                f"{self.path / MANIFEST}: sha256 is {found[:12]}..., the certificate vouches for "
                f"{certificate.manifest_sha256[:12]}...: the manifest was changed after export; export the model again"
            )
        return certificate

    def golden(self) -> Tensors:
        """The recorded inputs and outputs."""
        return read_tensors(self.path / GOLDEN)

    def plans(self) -> Tensors:
        """The ready-made plans."""
        return read_tensors(self.path / PLANS)

    def plan(
        self, sampler: str | None = None, steps: int | None = None, guidance_scale: float | None = None, **options: Any
    ) -> Plan:
        """A plan for this model; what is None is the bundle's default. See ``diffexport.plan.make_plan``."""
        return self.manifest.defaults.plan(self.spec, sampler, steps, guidance_scale, **options)

    def sampler(self, backend: str = "ort", **options: Any) -> Sampler:
        """A sampler of this bundle on a backend; options are the backend's own, such as ``threads``."""
        from diffexport.backends import open_session
        from diffexport.sampler import Sampler

        session = open_session(self, backend, **options)
        return Sampler(self.spec, session, self.manifest.defaults, self.manifest.decoder)


def load(path: str | Path) -> Bundle:
    """Open a bundle; see ``Bundle.open``."""
    return Bundle.open(path)


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(path: Path) -> FileEntry:
    """The manifest's entry for a file."""
    return FileEntry(size=path.stat().st_size, sha256=sha256_of(path))


def write_json(path: Path, value: msgspec.Struct) -> None:
    """Write a struct as indented JSON whose bytes depend on the value alone."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=2) + b"\n")


def read_tensors(path: Path) -> Tensors:
    """Read a safetensors file."""
    from safetensors.numpy import load

    try:
        tensors = load(read_regular(path, MAX_TENSORS))
    except Exception as error:  # safetensors and NumPy have a different exception for every kind of damage
        raise BundleError(f"{path}: cannot be read as safetensors ({error})") from error
    if not all(map(str.isprintable, tensors)):
        raise BundleError(f"{path}: names a tensor with more than text that can be printed")
    return tensors


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file; the same tensors give the same bytes."""
    from safetensors.numpy import save

    path.write_bytes(save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}))


def decode_plain(data: bytes, kind: type[_Struct]) -> _Struct:
    """A struct from JSON whose every text can be shown on a terminal, and every number kept in 64 bits.

    Raises:
        SpecError: it holds others.
        msgspec.DecodeError: it is no JSON of this kind.
    """
    value = msgspec.json.decode(data, type=kind)
    parts = [msgspec.to_builtins(value)]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            parts += part
        elif isinstance(part, str) and not part.isprintable():
            raise SpecError(f"{part[:80]!r}: expected text that can be printed")
        elif isinstance(part, int) and not -(1 << 63) <= part < 1 << 63:
            raise SpecError("a number takes more than 64 bits")
    return value


def _decode(path: Path, kind: type[_Struct]) -> _Struct:
    try:
        data = read_regular(path, MAX_JSON)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read ({error.strerror}); expected a bundle made by `diffx export`"
        ) from error
    try:
        schema = msgspec.json.decode(data).get("schema", SCHEMA)
        if schema != SCHEMA:
            raise BundleError(
                f"{path}: schema version {schema}, this diffexport reads {SCHEMA}; export the model again"
            )
        return decode_plain(data, kind)
    except (msgspec.DecodeError, SpecError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: not a valid {path.name} ({error}); export the model again") from error


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    if name != Path(name).name or name in (".", ".."):
        raise BundleError(f"{folder / MANIFEST}: lists {name!r}, expected a plain file name")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{path}: missing or not a regular file; copy the whole bundle again or export the model again"
        )
    size = path.stat().st_size
    if size != entry.size:
        raise BundleError(f"{path}: {size} bytes, the manifest says {entry.size}; the file was changed or cut off")
    found = sha256_of(path)
    if found != entry.sha256:
        raise BundleError(
            f"{path}: sha256 is {found[:12]}..., the manifest says {entry.sha256[:12]}...; the file was changed or damaged"
        )
