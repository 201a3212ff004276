"""Building the engines of a bundle: each graph in a process of its own, once for each key."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from diffexport.bundle import CPU_GRAPHS, Bundle, entry_of, write_json
from diffexport.decoding import tile_of
from diffexport.engines.header import check_header
from diffexport.engines.products import Product, check_targets, product_of
from diffexport.engines.profiles import Profile, parse_profiles
from diffexport.engines.record import (
    ENGINE,
    FOLDER,
    RECORD,
    SCHEMA,
    Engine,
    EngineKey,
    EngineRecord,
    engines_folder,
    engines_of,
    graph_sha256,
    read_engine,
    stale,
    weights_sha256,
)
from diffexport.engines.worker import Job, Report
from diffexport.errors import BackendError, EngineError
from diffexport.files import remove_left_overs, replacing_folder, writing

Progress = Callable[[str], None]
"""Called with what is being done; how long a build takes is not known beforehand."""

BUILT_GRAPHS = ("step", "step_plain", "sampler", "decoder")
"""The graphs that sampling needs; a bundle's others are built where they are asked for."""


@dataclass(frozen=True)
class Built:
    """One engine after a build.

    Attributes:
        engine: where and what it is.
        hit: it was there already.
        instead_of: in what the nearest engine that was there differs, where one was and none fitted.
    """

    engine: Engine
    hit: bool
    instead_of: list[str] = field(default_factory=list)


def build(
    bundle: Bundle,
    backend: str,
    *,
    targets: Sequence[str] = (),
    batches: str | None = None,
    graphs: Sequence[str] = (),
    tf32: bool = False,
    workspace: int | None = None,
    level: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Built]:
    """Build an engine of each graph of a bundle, or find the one that is there.

    Args:
        backend: trt or trt-rtx.
        targets: compute capabilities such as sm89; the GPU of this machine where none is given.
        batches: see ``parse_profiles``.
        graphs: names of the bundle's graphs; those of ``BUILT_GRAPHS`` that it has where none is given.
        tf32: let fp32 products run in TF32.
        workspace: most bytes of scratch memory.
        level: optimization level 0 .. 5.
        force: build what is there already, too.
        progress: called with what is being done.

    Returns:
        What became of each graph.

    Raises:
        EngineError: see ``check_targets``, ``parse_profiles`` and ``engine_from_onnx``.
    """
    product = product_of(backend)
    version = str(product.load().__version__)
    manifest = bundle.manifest
    if workspace is not None and workspace < 1:
        raise EngineError(f"--workspace {workspace}: expected at least 1")
    if level is not None and not 0 <= level <= 5:
        raise EngineError(f"--level {level}: expected 0 .. 5")
    found_here = _capability_here(product, targets)
    names = check_targets(product, targets, manifest.precision, found_here)
    profiles = parse_profiles(batches, manifest.defaults.batch, manifest.max_batch)
    keys = [
        EngineKey(
            graph=graph,
            graph_sha256=graph_sha256(bundle, graph),
            weights_sha256=weights_sha256(bundle),
            precision=manifest.precision,
            product=product.module,
            version=version,
            targets=names,
            profiles=(Profile(1, 1, 1),) if graph == "decoder" else profiles,  # one image at a time
            sides=_sides(bundle) if graph == "decoder" else {},
            tf32=tf32,
            workspace=workspace,
            level=level,
        )
        for graph in _graphs(bundle, graphs)
    ]
    folder = engines_folder(bundle)
    with writing(folder, EngineError):
        folder.mkdir(exist_ok=True)
        remove_left_overs(folder)
        found, _ = engines_of(bundle)
        results = [_build(bundle, product, key, found, force, progress or (lambda _what: None)) for key in keys]
    for engine in found:  # they can never run again
        if stale(bundle, engine):
            shutil.rmtree(engine.path)
    return results


def _capability_here(product: Product, targets: Sequence[str]) -> str | None:
    """The compute capability of this machine's GPU, or None without one; not looked at where it is not needed."""
    from diffexport.backends.cuda import device

    if product.targets and targets:
        return None
    try:
        return device().capability
    except BackendError:
        return None


def _graphs(bundle: Bundle, wanted: Sequence[str]) -> list[str]:
    there = [graph for graph in bundle.manifest.graphs if graph not in CPU_GRAPHS]  # for the CPU's sessions
    for graph in wanted:
        if graph not in there:
            raise EngineError(f"--graph {graph}: expected one of {', '.join(there)}")
    if wanted:
        return list(dict.fromkeys(wanted))
    needed = [graph for graph in BUILT_GRAPHS if graph in there]
    return [graph for graph in needed if bundle.spec.guidable or graph != "step"]  # it is step_plain without guidance


def _build(
    bundle: Bundle, product: Product, key: EngineKey, found: list[Engine], force: bool, progress: Progress
) -> Built:
    target = bundle.path / FOLDER / key.folder
    relatives = [e for e in found if (e.record.key.graph, e.record.key.product) == (key.graph, key.product)]
    same = [engine for engine in relatives if engine.path == target and engine.record.key == key]
    if same and not force:
        try:
            same[0].check_file()
            return Built(same[0], hit=True)
        except EngineError as error:
            progress(str(error))
    with replacing_folder(target) as work:
        report = _run_worker(Job(backend=product.backend, key=key), bundle.path, work / ENGINE, progress)
        assert report.network is not None
        record = EngineRecord(
            schema=SCHEMA,
            key=key,
            network=report.network,
            engine=entry_of(work / ENGINE),
            build_seconds=round(report.seconds, 3),
            peak_memory=report.peak_memory,
        )
        write_json(work / RECORD, record)
        check_header(Engine(work, record))
    nearest = min((engine.differences(key) for engine in relatives if engine not in same), key=len, default=[])
    return Built(read_engine(target), hit=False, instead_of=nearest)


def _sides(bundle: Bundle) -> dict[str, int]:
    """The sides of what is decoded at once: the whole latents, or a tile of them."""
    assert bundle.manifest.decoder is not None
    tile = tile_of(bundle.manifest.decoder)
    return {
        name: min(tile or side, side) for name, side in zip(("height", "width"), bundle.spec.shape[1:], strict=True)
    }


def _run_worker(job: Job, folder: Path, out: Path, progress: Progress) -> Report:
    """Run a build in a process of its own; the last thing it reported.

    Raises:
        EngineError: it failed, or its process ended without a word.
    """
    name, last, said = job.key.graph, Report(), ""
    command = [sys.executable, "-P", "-m", "diffexport.engines.worker"]
    environment = os.environ | {"PYTHONHASHSEED": "0"}  # which decides where things lie in memory; see the worker
    with (
        out.open("wb") as engine,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=engine, stderr=subprocess.PIPE
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stderr is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended; its status says more
                child.stdin.write(msgspec.json.encode(job) + b"\n")
                child.stdin.flush()
            for line in child.stderr:
                if line.startswith(b"{"):
                    last = msgspec.json.decode(line, type=Report)
                    if last.doing:
                        progress(f"{name}: {last.doing}")
                else:
                    said = line.decode(errors="replace").strip() or said
            child.wait()
        finally:
            child.kill()
    if last.error is not None:
        raise EngineError(last.error)
    if child.returncode or last.network is None or last.size != out.stat().st_size:
        raise EngineError(
            f"{name}: the building process ended with status {child.returncode} while {last.doing or 'starting'}"
            + (f" ({said})" if said else "")
        )
    return last
