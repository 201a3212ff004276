"""``diffx embed``: a C++ project around a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffexport_cli.options import BundlePath


def embed(
    bundle: BundlePath = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write.", show_default="the bundle's name with -cpp")
    ] = None,
    backend: Annotated[str, typer.Option(help="What the project runs on: ort, openvino, trt or trt-rtx.")] = "ort",
) -> None:
    """Write a C++ project that samples from a bundle: the runtime's sources, a main of ten lines, a CMake file, a README.

    Example: diffx embed digits.diffx --out digits-cpp
    """
    from diffexport.bundle import Bundle
    from diffexport.embedding import embed as write
    from diffexport_cli.output import find_bundle, size_of

    opened = Bundle.open(find_bundle(bundle))
    folder = write(opened, out or Path(f"{opened.manifest.name}-cpp"), backend)
    print(f"wrote {folder} ({size_of(folder)}); {folder / 'README.md'} says how to build it")
