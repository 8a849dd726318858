"""Checks of weight files that need no tensor library."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaderd.server.errors import SnapshotCorruptError
from loaderd.server.store.gguf import read_header
from loaderd.server.store.reading import open_unnoticed
from loaderd.server.store.selection import is_gguf

# The hub library's bound; real headers are smaller by an order of magnitude.
MAX_HEADER_BYTES = 25_000_000

_LONGEST_NAME = 255
_LENGTH = struct.Struct("<Q")
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Tensor:
    """What a header says of one tensor.

    Attributes:
        name: Its name.
        shape: Its shape.
        size_bytes: Its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def read_shards(data: bytes, index: str, model: str) -> frozenset[str]:
    """The files that an index of sharded weights names.

    Args:
        data: The index's content.
        index: Its name, such as `model.safetensors.index.json`; the shards are of that format.
        model: The model, for the error.

    Raises:
        SnapshotCorruptError: It is no index, or names something else than plain files beside
            it: a path there would make loading read a file outside the model's folder.
    """
    suffix = "." + index.split(".")[1]
    expected = f"a weight_map of plain {suffix} file names"
    try:
        shards = frozenset(json.loads(data)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SnapshotCorruptError(model, index, expected, "something else") from None
    if not shards:
        raise SnapshotCorruptError(model, index, expected, "an empty one")
    if not all(isinstance(shard, str) and _is_plain(shard, suffix) for shard in shards):
        raise SnapshotCorruptError(model, index, expected, "other names")
    return shards


def check_file(path: Path, file: str, model: str) -> None:
    """Checks a file as far as its header tells, if it is one of weights that has a header.

    Args:
        path: The file.
        file: Its name in the model.
        model: The model, for the error.

    Raises:
        SnapshotCorruptError, ModelUnsupportedError: See `check_weights` and `gguf.read_header`.
    """
    if file.endswith(".safetensors"):
        check_weights(path, file, model)
    elif is_gguf(file):
        read_header(path, file, model)


def check_weights(path: Path, file: str, model: str) -> None:
    """Compares a safetensors file's size with what its header says.

    Format: https://github.com/huggingface/safetensors#format - the header's length in 8 bytes,
    the header in JSON, the tensors' bytes without gaps.

    Args:
        path: The file.
        file: Its name in the model, for the error; a blob's own name is a hash.
        model: The model, for the error.

    Raises:
        SnapshotCorruptError: The header is unreadable, or the file is longer or shorter.
    """
    header_bytes, header = _read_header(path, file, model)
    try:
        end = max((_end(tensor) for _, tensor in _tensors(header)), default=0)
    except _UNREADABLE:
        raise _unreadable_header(model, file) from None
    expected = _LENGTH.size + header_bytes + end
    found = path.stat().st_size
    if found != expected:
        raise SnapshotCorruptError(model, file, f"{expected} bytes", f"{found} bytes")


def read_tensors(path: Path, file: str, model: str) -> list[Tensor]:
    """The tensors that a safetensors file's header lists.

    Args:
        path: The file.
        file: Its name in the model, for the error.
        model: The model, for the error.

    Raises:
        SnapshotCorruptError: The header is unreadable.
    """
    _, header = _read_header(path, file, model)
    try:
        return [
            Tensor(name, tuple(map(_size, tensor["shape"])), _end(tensor) - _begin(tensor))
            for name, tensor in _tensors(header)
        ]
    except _UNREADABLE:
        raise _unreadable_header(model, file) from None


def _read_header(path: Path, file: str, model: str) -> tuple[int, bytes]:
    """The length that a file says its header has, and the header."""
    with open_unnoticed(path) as weights:
        length = weights.read(_LENGTH.size)
        header_bytes = _LENGTH.unpack(length)[0] if len(length) == _LENGTH.size else 0
        header = weights.read(header_bytes) if header_bytes <= MAX_HEADER_BYTES else b""
    if not header or len(header) < header_bytes:
        found = f"{path.stat().st_size} bytes without one"
        raise SnapshotCorruptError(model, file, "a safetensors header", found)
    return header_bytes, header


def _unreadable_header(model: str, file: str) -> SnapshotCorruptError:
    return SnapshotCorruptError(model, file, "a safetensors header", "an unreadable one")


def _is_plain(name: str, suffix: str) -> bool:
    short = len(name.encode()) <= _LONGEST_NAME
    return short and name.endswith(suffix) and "/" not in name and name.isprintable()


def _tensors(header: bytes) -> Iterator[tuple[str, Any]]:
    return ((name, each) for name, each in json.loads(header).items() if name != "__metadata__")


def _begin(tensor: Any) -> int:
    return int(tensor["data_offsets"][0])


def _end(tensor: Any) -> int:
    begin, end = tensor["data_offsets"]
    if not 0 <= int(begin) <= int(end):
        raise ValueError("offsets go backwards")
    return int(end)


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("a size is no whole number")
    return value
