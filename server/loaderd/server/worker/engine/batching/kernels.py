"""Which matrix kernels of torch to use for a model's weights on a CPU, found out by trying.

torch has a matrix-vector product that reads weights about as fast as memory gives them, but uses
it for bfloat16 only while oneDNN is switched off. For more rows oneDNN is about twice as fast when
the weights were reordered for it before, those of float32 too. On a CPU without instructions for
16-bit numbers it has nothing for them, and torch's own loops are five times slower than a float32
product; there the weights are widened to float32, which changes no result but that sums are
rounded once, at the end. Reordered and widened weights are copies: the others stay, for few rows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

FEW = 2
"""Rows up to which the matrix-vector product is used."""

_TRIED_ROWS = 16
_TRIES = 4
_GAIN = 1.1


class Copy(Enum):
    """The form of a copy of the weights, for many rows."""

    NONE = "none"
    REORDERED = "reordered"
    WIDENED = "widened"

    def bytes_of(self, weight: torch.Tensor) -> int:
        """What the copy of a weight takes."""
        item = {Copy.NONE: 0, Copy.REORDERED: weight.itemsize, Copy.WIDENED: 4}[self]
        return int(item * weight.numel())


_COPIES = {
    Copy.REORDERED: "more with weights reordered for oneDNN",
    Copy.WIDENED: "more with weights widened to float32",
}

_Work = Callable[[torch.Tensor], None]
"""Multiplies rows, [1, rows, inputs], with some weights."""


@dataclass(frozen=True, slots=True)
class LinearPolicy:
    """How a model's linear layers are computed.

    Attributes:
        native_few: Whether few rows are computed with oneDNN switched off.
        copy: What more rows are computed with.
    """

    native_few: bool = False
    copy: Copy = Copy.NONE

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """A forward pass of so many tokens."""
        if self.native_few and tokens <= FEW:
            with _without_onednn():
                yield
        else:
            yield

    def __str__(self) -> str:
        few = [f"up to {FEW} rows as matrix-vector products"] if self.native_few else []
        many = [_COPIES[self.copy]] if self.copy in _COPIES else []
        return "linear layers: " + ", ".join(few + many) if few or many else ""


PLAIN = LinearPolicy()
"""As torch does it."""


class CopiedWeight:
    """A weight in another form.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        form: Not `Copy.NONE`.

    Raises:
        RuntimeError: This CPU, or this build of torch, has no such form.
        AttributeError: As above.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, form: Copy) -> None:
        weight = weight.detach()
        self._dtype = torch.float32 if form is Copy.WIDENED else weight.dtype
        self._bias = None if bias is None else bias.detach().to(self._dtype)
        self._weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
            weight.to(self._dtype).contiguous(), _TRIED_ROWS
        )

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layer's outputs, in the type of its inputs."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs.to(self._dtype), self._weight, self._bias, "none", [], ""
        )
        return product.to(inputs.dtype)


def uses_copies() -> bool:
    """Whether copies take part in the step that this thread computes."""
    return bool(torch._C._get_mkldnn_enabled())


def best_policy(weights: Sequence[torch.Tensor]) -> LinearPolicy:
    """Times the kernels, for a part of a second.

    Args:
        weights: Of one shape; together more than a cache holds, as those of a whole model are.
    """

    def plain(rows: torch.Tensor) -> None:
        for weight in weights:
            functional.linear(rows, weight)

    def native(rows: torch.Tensor) -> None:
        with _without_onednn():
            plain(rows)

    one, many = (weights[0].new_ones(1, rows, weights[0].shape[1]) for rows in (1, _TRIED_ROWS))
    with torch.inference_mode():
        works: dict[Copy, _Work] = {Copy.NONE: plain, **_copies(weights, many)}
        seconds = _seconds([partial(work, many) for work in works.values()])
        form, best = Copy.NONE, seconds[0]
        for other, taken in zip(works, seconds, strict=True):
            if _GAIN * taken < best:
                form, best = other, taken
        few, usual = _seconds([partial(native, one), partial(works[form], one)])
    return LinearPolicy(native_few=_GAIN * few < usual, copy=form)


def _copies(weights: Sequence[torch.Tensor], rows: torch.Tensor) -> dict[Copy, _Work]:
    """Products with the forms that are to be had and give the same results; small ones first."""
    works: dict[Copy, _Work] = {}
    expected = functional.linear(rows, weights[0]).float()
    is_wide = weights[0].dtype == torch.float32
    tolerance = 1e-3 if is_wide else 0.05
    for form in (Copy.REORDERED,) if is_wide else (Copy.REORDERED, Copy.WIDENED):
        try:
            copies = [CopiedWeight(weight, None, form) for weight in weights]
            found = copies[0].multiply(rows).float()
            same = torch.allclose(expected, found, tolerance, tolerance)
        except (AttributeError, RuntimeError) as error:
            logger.info("no weights %s: %s", form.value, str(error).partition("\n")[0])
            continue
        if same:
            works[form] = partial(_multiply_all, copies)
        else:
            logger.warning("weights %s give other results", form.value)
    return works


def _multiply_all(copies: Sequence[CopiedWeight], rows: torch.Tensor) -> None:
    for copy in copies:
        copy.multiply(rows)


@contextmanager
def _without_onednn() -> Iterator[None]:
    # The public switch touches other switches too, and warns of them.
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was)


def _seconds(works: Sequence[Callable[[], None]]) -> list[float]:
    """The shortest of some runs of each, in turns: what slows the box down slows all of them."""
    best = [math.inf] * len(works)
    for _ in range(_TRIES):
        for index, work in enumerate(works):
            begin = time.perf_counter()
            work()
            best[index] = min(best[index], time.perf_counter() - begin)
    return best
