"""The header of a GGUF file, read without a library: what is in it, and how long the file must be.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md - magic, version, counts,
metadata, a table of tensors, and the tensors' bytes, each at a multiple of the alignment.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from loaderd.server.errors import ModelUnsupportedError, SnapshotCorruptError
from loaderd.server.store.reading import open_unnoticed

MAX_HEADER_BYTES = 128 << 20
"""Vocabularies are in the header; real ones are smaller by an order of magnitude."""

_MAGIC = b"GGUF"
_VERSIONS = frozenset({2, 3})
_FIRST_READ = 8 << 20
_ALIGNMENT = 32
_ALIGNMENT_KEY = b"general.alignment"
_PRE_TOKENIZER_KEY = b"tokenizer.ggml.pre"
_MOST_DIMENSIONS = 8
_MOST_ENTRIES = 1 << 16
_UINT32, _STRING, _ARRAY = 4, 8, 9
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""By type of a metadata value, if its length is fixed."""

_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 40), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""By ggml's number of a tensor type: numbers of a block, and its bytes."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        shapes: Of its tensors.
        end: Where the last tensor ends: what the file has at least, in bytes.
        pre_tokenizer: What it calls the way to split text before it is tokenized; empty for none.
    """

    shapes: tuple[tuple[int, ...], ...]
    end: int
    pre_tokenizer: str = ""


def read_header(path: Path, file: str, model: str) -> GgufHeader:
    """Reads the header and compares the file's size with it.

    Args:
        path: The file.
        file: Its name in the model, for the error; a blob's own name is a hash.
        model: The model, for the error.

    Raises:
        SnapshotCorruptError: The header is unreadable, or the file is shorter than it says.
        ModelUnsupportedError: Of a version, or with tensors of a type, that is not known here.
    """
    found = path.stat().st_size
    data = b""
    with open_unnoticed(path) as content:
        while True:
            more = content.read(max(len(data), _FIRST_READ))
            data += more
            try:
                header = _Reader(data, model).header()
                break
            except (struct.error, IndexError, OverflowError):
                if more and len(data) < MAX_HEADER_BYTES:
                    continue
                problem = f"{found} bytes without a whole one"
            except _UnreadableError:
                problem = "an unreadable one"
            raise SnapshotCorruptError(model, file, "a GGUF header", problem) from None
    if found < header.end:
        raise SnapshotCorruptError(model, file, f"{header.end} bytes", f"{found} bytes")
    return header


class _UnreadableError(ValueError):
    """It is no header, however much of the file were read."""


class _Reader:
    """Goes through a header from its beginning; struct.error or IndexError where that ends.

    Args:
        data: The file's first bytes.
        model: The model, for the error.
    """

    def __init__(self, data: bytes, model: str) -> None:
        self._data = data
        self._model = model
        self._place = len(_MAGIC)

    def header(self) -> GgufHeader:
        if self._data[: len(_MAGIC)] != _MAGIC:
            raise _UnreadableError
        version = self._u32()
        if version not in _VERSIONS:
            problem = f"its GGUF file is of version {version}; 2 and 3 are known"
            raise ModelUnsupportedError(self._model, problem)
        tensors, entries = self._u64(), self._u64()
        if max(tensors, entries) > _MOST_ENTRIES:
            raise _UnreadableError
        alignment, pre_tokenizer = _ALIGNMENT, b""
        for _ in range(entries):
            key = self._bytes()
            kind = self._u32()
            if key == _ALIGNMENT_KEY and kind == _UINT32:
                alignment = _U32.unpack_from(self._data, self._place)[0]
            if key == _PRE_TOKENIZER_KEY and kind == _STRING:
                pre_tokenizer = self._bytes()
            else:
                self._skip(kind)
        if alignment == 0 or alignment % 8:
            raise _UnreadableError
        places = [self._tensor() for _ in range(tensors)]
        begin = -(-self._place // alignment) * alignment
        if any(offset % alignment for _, offset, _ in places):
            raise _UnreadableError
        end = max((offset + size for _, offset, size in places), default=0)
        shapes = tuple(shape for shape, _, _ in places)
        return GgufHeader(shapes, begin + end, pre_tokenizer.decode(errors="replace"))

    def _tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, offset and bytes of the next tensor in the table."""
        self._bytes()
        dimensions = self._u32()
        if dimensions > _MOST_DIMENSIONS:
            raise _UnreadableError
        shape = tuple(self._u64() for _ in range(dimensions))
        kind, offset = self._u32(), self._u64()
        if kind not in _BLOCKS:
            problem = f"its GGUF file holds tensors of type {kind}, which is not known here"
            raise ModelUnsupportedError(self._model, problem)
        numbers, size = _BLOCKS[kind]
        # Fastest-moving dimension first there, last here.
        return shape[::-1], offset, -(-math.prod(shape) // numbers) * size

    def _skip(self, kind: int) -> None:
        """Passes over a value."""
        if kind in _VALUE_BYTES:
            self._forward(_VALUE_BYTES[kind])
        elif kind == _STRING:
            self._bytes()
        elif kind == _ARRAY:
            element, count = self._u32(), self._u64()
            if element in _VALUE_BYTES:
                self._forward(count * _VALUE_BYTES[element])
            elif element == _STRING:
                self._forward_strings(count)
            else:
                raise _UnreadableError
        else:
            raise _UnreadableError

    def _forward_strings(self, count: int) -> None:
        """A vocabulary has a hundred thousand and more: in one loop, without calls of ours."""
        data, place, unpack = self._data, self._place, _U64.unpack_from
        for _ in range(count):
            place += 8 + unpack(data, place)[0]
        self._place = place
        self._forward(0)

    def _bytes(self) -> bytes:
        length = self._u64()
        begin = self._place
        self._forward(length)
        return self._data[begin : self._place]

    def _u32(self) -> int:
        value: int = _U32.unpack_from(self._data, self._place)[0]
        self._place += _U32.size
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack_from(self._data, self._place)[0]
        self._place += _U64.size
        return value

    def _forward(self, count: int) -> None:
        self._place += count
        if self._place > len(self._data):
            raise IndexError
