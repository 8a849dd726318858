"""Whose memory a tensor on the CPU has."""

from __future__ import annotations

from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a part of a mapped file, which costs no memory of its own.

    Where the system does not tell, it is taken for one.
    """
    address = tensor.data_ptr()
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return True
    for line in lines:
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        begin, end = (int(each, 16) for each in span.split("-"))
        if begin <= address < end:
            return inode != "0"
    return False
