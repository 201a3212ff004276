"""A guided step on the GPU by PyTorch and by every backend of diffexport that is there: how long, how exact, how near to
the rate of a matrix product that is measured in the same run. Peers take turns, so that what changes meets all of them."""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffexport
from diffexport.backends import BACKENDS, open_session
from diffexport.backends.session import Session
from diffexport.bundle import Bundle
from diffexport.engines.build import build
from diffexport.engines.products import PRODUCTS
from diffexport.parity import relative_l2
from diffexport.plan import COLUMNS, denoise_rows
from diffexport.probes import probe_state
from diffexport.schedules import DEFAULT_SCHEDULES
from diffexport.spec import ModelSpec
from diffexport_reference import SigmaEmbedderSinCos, Unet
from diffexport_reference.model import CondEmbedderLabel
from diffexport_reference.official_dit import OfficialDiT

GUIDANCE, SIGMA = 4.0, 0.5
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDS, STEPS, MATRIX = 7, 5, 8192

Made = tuple[torch.nn.Module, ModelSpec]


def latent_dit(width: int, depth: int, heads: int, side: int = 32, classes: int = 1000) -> Made:
    """A DiT of the official code base over latents of 256 pixels."""
    module = OfficialDiT(
        input_size=side, hidden_size=width, depth=depth, num_heads=heads, num_classes=classes, patch_size=2
    )
    return module, ModelSpec(
        family="official DiT",
        shape=(4, side, side),
        prediction="eps",
        schedule=DEFAULT_SCHEDULES["ddpm"],
        num_classes=classes,
        variance="learned",
        guided_channels=3,
        noise_input="timestep",
        scaled=True,
    )


def image_unet(side: int = 32, **sizes: Any) -> Made:
    """smalldiffusion's U-Net for CIFAR, with labels."""
    width = 4 * sizes.get("ch", 128)
    module = Unet(
        side,
        3,
        3,
        sig_embed=SigmaEmbedderSinCos(width),
        cond_embed=CondEmbedderLabel(width, 10),
        **sizes,
    )
    schedule = DEFAULT_SCHEDULES["ddpm"]
    return module, ModelSpec(
        family="U-Net", shape=(3, side, side), prediction="eps", schedule=schedule, num_classes=10, scaled=True
    )


MODELS: dict[str, Callable[[], Made]] = {
    "DiT-S/2": lambda: latent_dit(384, 12, 6),
    "DiT-B/2": lambda: latent_dit(768, 12, 12),
    "DiT-XL/2": lambda: latent_dit(1152, 28, 16),
    "CIFAR U-Net": image_unet,
}
TINY: dict[str, Callable[[], Made]] = {
    "tiny DiT": lambda: latent_dit(32, 2, 2, side=8, classes=5),
    "tiny U-Net": lambda: image_unet(8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,)),
}


@dataclass
class Peer:
    """One way to run a step: ``begin`` puts the start in place, ``run`` does so many steps and waits for them."""

    name: str
    precision: str
    begin: Callable[[], None]
    run: Callable[[int], None]
    result: Callable[[], np.ndarray]
    seconds: list[float] = field(default_factory=list)
    error: float = float("nan")


@dataclass(frozen=True)
class Row:
    """One line of the table; what did not run has a reason in place of figures."""

    model: str
    batch: str
    runner: str
    precision: str
    figures: tuple[str, str, str, str] | None = None
    reason: str = ""

    def __str__(self) -> str:
        cells = self.figures or (f"**not run**: {self.reason}", "", "", "")
        return f"| {self.model} | {self.batch} | {self.runner} | {self.precision} | {' | '.join(cells)} |"


def torch_peer(name: str, made: Made, batch: int, device: str, precision: str, compiled: bool = False) -> Peer:
    """The module under autocast, both halves of guidance in one batch, as the official code runs it."""
    module, spec = made
    network = torch.compile(module) if compiled else module
    start = probe_state(spec, SIGMA, 0, range(batch))
    assert start.label is not None
    given = torch.from_numpy(start.x).to(device)
    label = torch.from_numpy(start.label).to(device)
    labels = torch.cat([label, torch.full_like(label, spec.null_label)])
    r = dict(zip(COLUMNS, map(float, denoise_rows(spec, [SIGMA], GUIDANCE)[0]), strict=True))
    levels = torch.full((2 * batch,), r["c_noise"], device=device)
    channels, guided = spec.shape[0], spec.guided_channels or spec.shape[0]
    state = [given]

    def step(x: torch.Tensor) -> torch.Tensor:
        scaled = r["c_in"] * x
        with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
            out = network(torch.cat([scaled, scaled]), levels, labels)
        cond, uncond = out.float()[:, :channels].split(batch)
        mixed = uncond[:, :guided] + r["w"] * (cond[:, :guided] - uncond[:, :guided])
        return r["c_skip"] * x + r["c_out"] * torch.cat([mixed, cond[:, guided:]], 1)

    @torch.inference_mode()
    def run(count: int) -> None:
        for _ in range(count):
            state[0] = step(state[0])
        if device == "cuda":
            torch.cuda.synchronize()

    return Peer(name, precision, lambda: state.__setitem__(0, given), run, lambda: state[0].cpu().numpy())


def session_peer(backend: str, bundle: Bundle, session: Session, batch: int) -> Peer:
    """A backend's session, one call a step."""
    start = probe_state(bundle.spec, SIGMA, 0, range(batch))
    row = denoise_rows(bundle.spec, [SIGMA], GUIDANCE)[0].astype(np.float32)

    def run(count: int) -> None:
        for _ in range(count):
            session.step(row)
        session.state()  # waits for the device

    name = f"{backend} on {session.device}"
    return Peer(
        name, bundle.manifest.precision, lambda: session.begin(start.x, start.label), run, lambda: session.state()[0]
    )


def matrix_rate(device: str, precision: str, size: int) -> float:
    """TFLOP/s of a product of square matrices, the median of some."""
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS + 2):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2e-12 * size**3 / statistics.median(seconds[2:])


def flops(made: Made) -> int:
    """Of one guided step of one sample."""
    module, spec = made
    device = next(module.parameters()).device
    x = torch.zeros(2, *spec.shape, device=device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(x, torch.ones(2, device=device), torch.zeros(2, dtype=torch.int64, device=device))
    return int(counter.get_total_flops())


def measured(peer: Peer) -> Iterator[None]:
    """Warm up, then a round each time it is resumed."""
    peer.begin()
    peer.run(3)
    for _ in range(ROUNDS):
        yield
        peer.begin()
        started = time.perf_counter()
        peer.run(STEPS)
        peer.seconds.append((time.perf_counter() - started) / STEPS)


@dataclass(frozen=True)
class Runner:
    """A way to run steps: how to make its peer for a bundle's model and a batch, or why it cannot be had here."""

    name: str
    make: Callable[[Made, dict[str, Bundle], int, str, ExitStack], Peer]
    problem: str | None = None
    needs_bundle: bool = False


def runners_of(options: argparse.Namespace, device: str) -> list[Runner]:
    """Every runner that was asked for, those too that cannot be had."""
    no_torch = None if options.tiny or torch.cuda.is_available() else "PyTorch sees no CUDA device"
    runners = [
        Runner(
            "PyTorch eager", lambda made, _, batch, p, __: torch_peer("PyTorch eager", made, batch, device, p), no_torch
        ),
        Runner(
            "torch.compile",
            lambda made, _, batch, p, __: torch_peer("torch.compile", made, batch, device, p, compiled=True),
            "left out by --no-compile" if options.no_compile else no_torch,
        ),
    ]
    for backend in options.backends:
        fallback = options.tiny and backend.startswith("ort-")
        runners.append(
            Runner(
                backend,
                functools.partial(opened, backend, fallback, options.batches),
                None if fallback else BACKENDS[backend].problem(),
                needs_bundle=True,
            )
        )
    return runners


def check_model(
    name: str, made: Made, runners: list[Runner], options: argparse.Namespace, rates: dict[str, float], folder: Path
) -> Iterator[Row]:
    """Every row of one model; rows of a batch come as soon as it is measured."""
    module, spec = made
    work = flops(made)
    bundles: dict[str, Bundle] = {}
    for precision in options.precisions if any(runner.needs_bundle for runner in runners) else ():
        say(f"{name}: exporting in {precision}")
        out = folder / f"{name.replace('/', '-').replace(' ', '-')}-{precision}.diffx"
        bundles[precision] = diffexport.export(
            module, spec, out, precision=precision, max_batch=1, allow_mismatch=True, thorough=False
        )
    for batch in options.batches:
        with ExitStack() as stack:
            yield from check_batch(name, made, bundles, runners, batch, options, work * batch, rates, stack)


def check_batch(
    name: str,
    made: Made,
    bundles: dict[str, Bundle],
    runners: list[Runner],
    batch: int,
    options: argparse.Namespace,
    work: float,
    rates: dict[str, float],
    stack: ExitStack,
) -> Iterator[Row]:
    """The rows of one model at one batch: all peers are made, and then take turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made[0].to(device)
    reference = torch_peer("reference", made, batch, device, "fp32")
    reference.run(1)
    expected = reference.result()
    peers = []
    for precision, runner in itertools.product(options.precisions, runners):
        say(f"{name}, batch {batch}: {runner.name} in {precision}")
        try:
            peer = runner.make(made, bundles, batch, precision, stack)
            peer.begin()
            peer.run(1)
            peer.error = relative_l2(peer.result(), expected)
            peers.append((peer, measured(peer)))
        except Exception as error:  # whatever it raised, the others go on and the table says so
            first = (str(error).splitlines() or [""])[0]
            yield Row(name, str(batch), runner.name, precision, reason=f"{type(error).__name__}: {first}")
    say(f"{name}, batch {batch}: {len(peers)} runners take turns")
    for _ in range(ROUNDS + 1):
        for _, rounds in peers:
            next(rounds, None)
    for peer, _ in peers:
        yield figures(name, batch, peer, work, rates)


def opened(
    backend: str,
    fallback: bool,
    batches: list[int],
    _made: Made,
    bundles: dict[str, Bundle],
    batch: int,
    precision: str,
    stack: ExitStack,
) -> Peer:
    """A backend's session on a bundle, with its engines built where it needs any."""
    bundle = bundles[precision]
    if backend in PRODUCTS:
        build(bundle, backend, batches=",".join(map(str, batches)), graphs=["step"])
    options = {"allow_fallback": True} if fallback else {}
    session = open_session(bundle, backend, selftest=False, **options)  # its parity is in the table
    stack.callback(session.close)
    return session_peer(backend, bundle, session, batch)


def figures(model: str, batch: int, peer: Peer, work: float, rates: dict[str, float]) -> Row:
    median = statistics.median(peer.seconds)
    reached = 1e-12 * work / median
    rate = rates.get(peer.precision)
    milliseconds = f"{1e3 * median:.3g} ms ({1e3 * min(peer.seconds):.3g} to {1e3 * max(peer.seconds):.3g})"
    of_rate = f"{reached / rate:.0%}" if rate else "not measured"
    return Row(model, batch, peer.name, peer.precision, (milliseconds, f"{reached:.3g}", of_rate, f"{peer.error:.1e}"))


def write(out: Path, rows: list[Row], rates: dict[str, float], options: argparse.Namespace) -> None:
    """The table, with what it was measured on."""
    names = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx_cu12", "tensorrt_rtx_cu13")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no NVIDIA GPU"
    measured_rates = ", ".join(f"{precision} {rate:.3g}" for precision, rate in rates.items())
    lines = [
        "# A step on a GPU",
        "",
        f"Written by `scripts/gpu-check{' --tiny' if options.tiny else ''}` on {datetime.date.today()}: {gpu}, "
        f"{', '.join(versions)}.",
        f"One guided step (guidance {GUIDANCE:g}), random weights. Medians of {ROUNDS} rounds of {STEPS} steps, least and "
        "largest in brackets; runners take turns. PyTorch runs under autocast. Error: relative L2 of the denoised estimate "
        "beside PyTorch in fp32 without TF32.",
        f"Rate of a matrix product in this run, TFLOP/s: {measured_rates or 'not measured'}.",
        "",
        "| model | batch | runner | precision | a step | TFLOP/s | of the matrix rate | error |",
        "|---|---|---|---|---|---|---|---|",
        *map(str, rows),
        "",
    ]
    out.write_text("\n".join(lines), encoding="utf-8")


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/gpu.md"), help="the Markdown file to write")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU, to try this script itself")
    parser.add_argument("--models", help=f"some of {', '.join(MODELS)}; all of them by default")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--precisions", default=None, help="of fp32,fp16,bf16; fp16,bf16 by default")
    parser.add_argument("--backends", default="ort-cuda,ort-trt,trt,trt-rtx")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    options = parser.parse_args(words)
    models = TINY if options.tiny else MODELS
    names = options.models.split(",") if options.models else list(models)
    options.batches = [int(batch) for batch in options.batches.split(",")]
    options.precisions = (options.precisions or ("fp32" if options.tiny else "fp16,bf16")).split(",")
    options.backends = options.backends.split(",")
    unknown = [name for name in names if name not in models] + [b for b in options.backends if b not in BACKENDS]
    if unknown:
        parser.error(f"{unknown[0]}: not one of {', '.join([*models, *BACKENDS])}")

    device = "cpu" if options.tiny else "cuda"
    rates = {}
    if options.tiny or torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        rates = {p: matrix_rate(device, p, 256 if options.tiny else MATRIX) for p in options.precisions}
    runners = runners_of(options, device)
    asked = ", ".join(names), ", ".join(map(str, options.batches)), ", ".join(options.precisions)
    rows = [
        Row(asked[0], asked[1], runner.name, asked[2], reason=runner.problem)
        for runner in runners
        if runner.problem is not None
    ]
    runners = [runner for runner in runners if runner.problem is None]
    with tempfile.TemporaryDirectory() as folder:
        for name in names if runners else ():
            torch.manual_seed(0)
            module, spec = models[name]()
            for parameter in module.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
            for row in check_model(name, (module.eval(), spec), runners, options, rates, Path(folder)):
                rows.append(row)
                write(options.out, rows, rates, options)  # what is measured is kept
    write(options.out, rows, rates, options)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
