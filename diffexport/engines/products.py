"""The two TensorRT products, which share one API, and what each builds for."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffexport.errors import EngineError


@dataclass(frozen=True)
class Product:
    """One TensorRT.

    Attributes:
        backend: what a user calls it.
        module: its import name.
        install: what to type where it is missing.
        targets: the GPUs that it can build for without having one, by compute capability; none means that it builds
            for the GPU of the machine it runs on.
    """

    backend: str
    module: str
    install: str
    targets: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def load(self) -> Any:
        """Its Python module.

        Raises:
            EngineError: it is not installed, or its libraries cannot be loaded.
        """
        if not self.installed:
            raise EngineError(f"{self.backend}: {self.module} is not installed; {self.install}")
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            raise EngineError(f"{self.backend}: {self.module} cannot be loaded ({error})") from error


PRODUCTS = {
    product.backend: product
    for product in (
        Product("trt", "tensorrt", "pip install 'diffexport[trt]'"),
        Product(
            "trt-rtx",
            "tensorrt_rtx",
            "pip install 'diffexport[rtx]'",
            ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        ),
    )
}

_BF16_FROM = 80
"""The first compute capability with bfloat16."""


def product_of(backend: str) -> Product:
    """The product that a backend runs on.

    Raises:
        EngineError: it runs on none.
    """
    if backend not in PRODUCTS:
        raise EngineError(f"backend {backend!r}: engines are built for {' and '.join(PRODUCTS)}")
    return PRODUCTS[backend]


def check_targets(product: Product, targets: Sequence[str], precision: str, found: str | None) -> tuple[str, ...]:
    """The compute capabilities to build for, in order, each once.

    Args:
        targets: what was asked for; nothing means the GPU of this machine.
        found: the compute capability of this machine's GPU, or None without one.

    Raises:
        EngineError: a target that cannot be, or none where one is needed.
    """
    names = [target.strip().lower().replace("sm_", "sm") for target in targets]
    if product.targets:
        for name in names:
            if name not in product.targets:
                close = difflib.get_close_matches(name, product.targets, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise EngineError(
                    f"--target {name}: {hint}TensorRT for RTX builds for {', '.join(product.targets)}; "
                    "data-centre GPUs such as sm90 and sm100 need --backend trt on that machine"
                )
        if not names:
            if found is None:
                raise EngineError(
                    "--target: this machine has no NVIDIA GPU to build for; name the GPUs of the machines that will "
                    f"run it, such as --target sm89,sm120 (known: {', '.join(product.targets)})"
                )
            return check_targets(product, [found], precision, found)
    else:
        if found is None:
            raise EngineError(
                "backend 'trt' builds on the machine whose GPU will run the engine, and no NVIDIA GPU is here; "
                "build there, or build with --backend trt-rtx --target sm89 for RTX GPUs"
            )
        if any(name != found for name in names):
            raise EngineError(f"--target {','.join(names)}: backend 'trt' builds for the GPU in this machine, {found}")
        names = [found]
    for name in names:
        if precision == "bf16" and int(name.removeprefix("sm")) < _BF16_FROM:
            raise EngineError(f"--target {name}: this GPU has no bf16; export the model with --fp16 for it")
    return tuple(sorted(set(names), key=lambda name: int(name.removeprefix("sm"))))
