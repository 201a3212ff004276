"""What an ONNX file asks for beyond itself, read off its bytes before any runtime sees it.

A graph of a bundle has ONNX's own operators and one file of weights beside it, and nothing else: no operators of other
domains, which may load code, no functions, and no external data elsewhere. Read here is the wire format of protocol
buffers with the field numbers of onnx.proto, so that the check needs no package and no more memory than the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from diffexport.errors import BundleError
from diffexport.files import read_regular

MAX_BYTES = 1 << 28
"""Of a graph's file; its weights lie in a file of their own."""

DOMAINS = ("", "ai.onnx")
_MAX_DEPTH = 16
"""Graphs inside graphs."""

Message = memoryview


def check_graph(path: Path, weights: Path) -> None:
    """See that a graph asks for nothing but ONNX's own operators and parts of one file of weights.

    Raises:
        BundleError: it asks for something else, or is no ONNX file.
    """
    try:
        _model(memoryview(read_regular(path, MAX_BYTES)), weights.name, weights.stat().st_size)
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: refused, {error}; use bundles made by `diffx export`") from error


def _model(model: Message, weights: str, size: int) -> None:
    graphs = 0
    for field, value in _fields(model):
        if field == 7:
            _graph(_message(value), weights, size, 0)
            graphs += 1
        elif field == 8:
            for number, domain in _fields(_message(value)):
                if number == 1:
                    _check_domain(domain)
        elif field in (20, 25):
            raise ValueError(f"it holds {'functions' if field == 25 else 'training'}, which a bundle's graph does not")
    if graphs != 1:
        raise ValueError("it is no ONNX model")


def _graph(graph: Message, weights: str, size: int, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"it holds graphs inside graphs, more than {_MAX_DEPTH} deep")
    for field, value in _fields(graph):
        if field == 1:
            for number, part in _fields(_message(value)):
                if number == 7:
                    _check_domain(part)
                elif number == 5:
                    _attribute(_message(part), weights, size, depth)
        elif field == 5:
            _tensor(_message(value), weights, size)
        elif field == 15:
            raise ValueError("it holds sparse tensors, which a bundle's graph does not")


def _attribute(attribute: Message, weights: str, size: int, depth: int) -> None:
    for field, value in _fields(attribute):
        if field in (5, 10):
            _tensor(_message(value), weights, size)
        elif field in (6, 11):
            _graph(_message(value), weights, size, depth + 1)
        elif field in (22, 23):
            raise ValueError("it holds sparse tensors, which a bundle's graph does not")


def _tensor(tensor: Message, weights: str, size: int) -> None:
    """A tensor's numbers are in the file, or in a part of the weights that is there."""
    dims: list[int] = []
    there, external, entries = 0, False, {}
    for field, value in _fields(tensor):
        if field == 1:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif field in (4, 5, 6, 7, 9, 10, 11):
            there += len(value) if isinstance(value, memoryview) else 1
        elif field == 13:
            key, text = _entry(_message(value))
            if key in entries:
                raise ValueError(f"a tensor says twice where its {key} is")
            entries[key] = text
        elif field == 14:
            external = external or value == 1
    if external or entries:
        there += _external(entries, weights, size)
    if any(side >= 1 << 62 for side in dims) or math.prod(dims) > 2 * there:
        raise ValueError(f"a tensor of shape {tuple(dims[:8])} holds {there} bytes")


def _external(entries: dict[str, str], weights: str, size: int) -> int:
    """How many bytes of the weights a tensor takes."""
    location = entries.get("location")
    if location != weights:
        raise ValueError(f"a tensor lies in {location!r}, expected {weights!r}")
    if unknown := entries.keys() - {"location", "offset", "length", "checksum"}:
        raise ValueError(f"a tensor has external data with {sorted(unknown)[0]!r}, which is not known")
    numbers = [entries.get("offset", "0"), entries.get("length", "")]
    if not all(number.isdecimal() and number.isascii() and len(number) < 20 for number in numbers):
        raise ValueError(f"a tensor has offset {numbers[0]!r} and length {numbers[1]!r}, expected numbers")
    offset, length = map(int, numbers)
    if offset + length > size:
        raise ValueError(f"a tensor ends at byte {offset + length} of {weights!r}, which has {size}")
    return length


def _entry(message: Message) -> tuple[str, str]:
    parts = {field: bytes(_message(value)).decode("utf-8") for field, value in _fields(message) if field in (1, 2)}
    return parts.get(1, ""), parts.get(2, "")


def _check_domain(domain: int | Message) -> None:
    name = bytes(_message(domain)).decode("utf-8")
    if name not in DOMAINS:
        raise ValueError(f"it uses operators of the domain {name!r}, expected ONNX's own")


def _message(value: int | Message) -> Message:
    if isinstance(value, int):
        raise ValueError("it is no ONNX model")
    return value


def _varints(packed: Message) -> Iterator[int]:
    position = 0
    while position < len(packed):
        value, position = _varint(packed, position)
        yield value


def _varint(data: Message, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    if value >> 64:  # others would leave out the upper bits and read another number
        raise ValueError("it is no ONNX model")
    return value, position


def _fields(data: Message) -> Iterator[tuple[int, int | Message]]:
    """The fields of a message in order: numbers as they are, everything else as bytes."""
    position, end = 0, len(data)
    while position < end:
        tag, position = (data[position], position + 1) if data[position] < 0x80 else _varint(data, position)
        kind = tag & 7
        if not 8 <= tag < 1 << 32:  # others would leave out the upper bits and read another field
            raise ValueError("it is no ONNX model")
        if kind == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, position = _varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("it is no ONNX model")
        if position + length > end:
            raise ValueError("it is cut off")
        yield tag >> 3, data[position : position + length]
        position += length
