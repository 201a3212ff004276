"""The first bytes of an engine of TensorRT for RTX, which tell its version and its targets without a GPU.

The layout is not documented; it is read off engines of version 1.7 of known targets: "vtrt", at 0x10 the size in bytes,
at 0x18 four bytes of version, at 0x20 a bit for each compute capability.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from diffexport.engines.products import PRODUCTS
from diffexport.engines.record import Engine
from diffexport.errors import EngineError

_MAGIC = b"vtrt"
LAYOUT = struct.Struct("<4s12xQ4B4xI")
"""Magic, size, four numbers of version, mask of targets."""


@dataclass(frozen=True)
class Header:
    """What the plan of an RTX engine says.

    Attributes:
        size: of the whole plan in bytes.
        version: of the product that built it.
        targets: compute capabilities that it holds code for.
    """

    size: int
    version: str
    targets: tuple[str, ...]


def read_header(path: Path) -> Header | None:
    """The header of an RTX engine, or None for a file that has none."""
    with path.open("rb") as file:
        data = file.read(LAYOUT.size)
    if len(data) < LAYOUT.size or not data.startswith(_MAGIC):
        return None
    _, size, *version, mask = LAYOUT.unpack(data)
    known = PRODUCTS["trt-rtx"].targets
    return Header(size, ".".join(map(str, version)), tuple(known[bit] for bit in range(len(known)) if mask >> bit & 1))


def check_header(engine: Engine) -> None:
    """See that the plan of an RTX engine says what its record says.

    Raises:
        EngineError: it is no such plan, or of another version or other targets.
    """
    key = engine.record.key
    if key.product != PRODUCTS["trt-rtx"].module:
        return
    header = read_header(engine.file)
    if header is None:
        raise EngineError(f"{engine.file}: is no engine of TensorRT for RTX; build again with `diffx build`")
    found = header.size, header.version, header.targets
    if found != (engine.record.engine.size, key.version, key.targets):
        raise EngineError(
            f"{engine.file}: its header says version {header.version}, targets {','.join(header.targets)}, "
            f"{header.size} bytes; its record says {key.version}, {','.join(key.targets)}, {engine.record.engine.size}"
        )
