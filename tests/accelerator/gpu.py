"""The first CUDA device as the driver's own tool sees it, from outside."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from tests.waiting import until

DEVICE = "cuda:0"
SLACK = 64 << 20
"""Bytes in which the driver's figure may differ from one moment to the other."""


def total_bytes() -> int:
    """Its memory."""
    return _query("memory.total")


def used_bytes() -> int:
    """Memory that all processes hold."""
    return _query("memory.used")


def steady_bytes() -> int:
    """The memory in use, once it stays as it is."""
    figures = [used_bytes()]

    def is_steady() -> bool:
        figures.append(used_bytes())
        return abs(figures[-1] - figures[-2]) < SLACK

    until(is_steady, interval_s=0.5)
    return figures[-1]


def settled(condition: Callable[[int], bool]) -> int:
    """The memory in use, once it is as it should be: drivers free it a moment after a process."""
    until(lambda: condition(used_bytes()), interval_s=0.1)
    return used_bytes()


def _query(what: str) -> int:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(answer.stdout) << 20
