"""Threads for what is computed once, such as loading a model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def in_passing_thread(work: Callable[[], None], name: str) -> None:
    """Does something in a thread that ends with it, and waits for it.

    OpenMP keeps threads for each thread that has computed and still lives. While there are more of
    them than cores they wait for each other asleep, and every operator of the engine would have to
    wake them.

    Args:
        work: What to do; what it raises is raised here.
        name: Of the thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=name) as passing:
        passing.submit(work).result()
