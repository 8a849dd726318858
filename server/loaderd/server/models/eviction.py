"""Which models go so that another one fits."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from loaderd.server.models.fitting import place_all
from loaderd.server.models.placement import DeviceBook, Needs
from loaderd.server.models.where import Where


def to_evict(
    book: DeviceBook,
    needs: Needs,
    where: Where,
    idle: Sequence[str],
    now: float,
    *,
    count: int = 1,
) -> list[str]:
    """The models to unload, of those that nobody uses.

    Those that were used least recently go first, and none goes whose memory would not help.

    Args:
        book: What is free and who has the rest.
        needs: What is to fit.
        where: Where it may go.
        idle: Ids of models that may go, the least recently used first.
        now: Monotonic time.
        count: How many replicas are to fit.

    Returns:
        Their ids; empty if it fits without, or would not fit if all of them went.
    """

    def fits_without(gone: Sequence[str]) -> bool:
        rest = copy.deepcopy(book)
        for model_id in gone:
            rest.release(model_id, now)
        return place_all(rest, needs, where, count)[-1].fits

    going: list[str] = []
    for model_id in idle:
        if fits_without(going):
            break
        going.append(model_id)
    if not fits_without(going):
        return []
    for model_id in list(going):
        others = [each for each in going if each != model_id]
        if fits_without(others):
            going = others
    return going
