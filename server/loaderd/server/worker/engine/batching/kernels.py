"""Which matrix kernels of torch to use for a model's weights on a CPU, found out by trying.

torch has a matrix-vector product that reads weights about as fast as memory gives them, but uses
it for bfloat16 only while oneDNN is switched off. For more rows oneDNN is about twice as fast when
the weights were reordered for it before, those of float32 too. On a CPU without instructions for
16-bit numbers it has nothing for them, and torch's own loops are five times slower than a float32
product. There FBGEMM, which reads weights packed as float16 and computes in float32, is the fastest
for any number of rows; else the weights are widened to float32. Both change no result but that
sums are rounded once, at the end. Reordered, packed and widened weights are copies: the others
stay, for few rows.
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
_LOST = 2**-12
"""Largest error of a packed weight, as a share of the usual weight; bfloat16 rounds to 2**-9."""


class Copy(Enum):
    """The form of a copy of the weights, for many rows."""

    NONE = "none"
    REORDERED = "reordered"
    PACKED = "packed"
    WIDENED = "widened"

    def bytes_of(self, weight: torch.Tensor) -> int:
        """What the copy of a weight takes."""
        sizes = {Copy.NONE: 0, Copy.REORDERED: weight.itemsize, Copy.PACKED: 2, Copy.WIDENED: 4}
        return int(sizes[self] * weight.numel())


_COPIES = {
    Copy.REORDERED: "with weights reordered for oneDNN",
    Copy.PACKED: "in float32 with weights packed as float16",
    Copy.WIDENED: "in float32 with widened weights",
}

_Work = Callable[[torch.Tensor], None]
"""Multiplies rows, [1, rows, inputs], with some weights."""


@dataclass(frozen=True, slots=True)
class LinearPolicy:
    """How a model's linear layers are computed.

    Attributes:
        native_few: Whether few rows are computed as they are, with oneDNN switched off.
        copy: What other numbers of rows are computed with.
    """

    native_few: bool = False
    copy: Copy = Copy.NONE

    @property
    def activations(self) -> torch.dtype | None:
        """What goes from layer to layer at the least cost; None for the model's own type."""
        return torch.float32 if self.copy in {Copy.PACKED, Copy.WIDENED} else None

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """A forward pass of so many tokens."""
        if self.native_few and tokens <= FEW:
            with _without_onednn():
                yield
        else:
            yield

    def __str__(self) -> str:
        few = f"up to {FEW} rows as matrix-vector products" if self.native_few else ""
        many = _COPIES.get(self.copy, "")
        if few and many:
            many = f"more {many}"
        return "linear layers: " + ", ".join(filter(None, (few, many))) if few or many else ""


PLAIN = LinearPolicy()
"""As torch does it."""


class UnfitWeightError(RuntimeError):
    """A form cannot hold the weight."""


class CopiedWeight:
    """A weight in another form.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        form: Not `Copy.NONE`.

    Raises:
        UnfitWeightError: The form cannot hold this weight.
        RuntimeError: This CPU, or this build of torch, has no such form.
        AttributeError: As above.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, form: Copy) -> None:
        weight = weight.detach()
        self._dtype = weight.dtype if form is Copy.REORDERED else torch.float32
        bias = None if bias is None else bias.detach().to(self._dtype)
        make = _packed if form is Copy.PACKED else _reordered
        self._product = make(weight.to(self._dtype).contiguous(), bias)

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layer's outputs, in the type of its inputs."""
        return self._product(inputs.to(self._dtype)).to(inputs.dtype)


_Product = Callable[[torch.Tensor], torch.Tensor]


def _reordered(weight: torch.Tensor, bias: torch.Tensor | None) -> _Product:
    mine = torch.ops.mkldnn._reorder_linear_weight(weight, _TRIED_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda inputs: multiply(inputs, mine, bias, "none", [], "")


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> _Product:
    """FBGEMM's.

    Raises:
        UnfitWeightError: As float16 the weights are not what they were.
        RuntimeError: There is no FBGEMM.
    """
    # Weights of bfloat16 have fewer digits than float16, which has fewer exponents.
    error = (weight.half().float() - weight).abs_().max()
    if not error <= min(_LOST * weight.square().mean().sqrt(), torch.finfo(torch.float32).max):
        raise UnfitWeightError("float16 cannot hold the weights")
    mine = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return lambda inputs: multiply(inputs, mine)


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

    *few, many = (
        weights[0].new_ones(1, rows, weights[0].shape[1])
        for rows in (*range(1, FEW + 1), _TRIED_ROWS)
    )
    with torch.inference_mode():
        works: dict[Copy, _Work] = {Copy.NONE: plain, **_copies(weights, many)}
        seconds = _seconds([partial(work, many) for work in works.values()])
        form, best = Copy.NONE, seconds[0]
        for other, taken in zip(works, seconds, strict=True):
            if _GAIN * taken < best:
                form, best = other, taken
        own = _seconds([partial(native, rows) for rows in few])
        usual = _seconds([partial(works[form], rows) for rows in few])
    return LinearPolicy(native_few=_GAIN * sum(own) < sum(usual), copy=form)


def _copies(weights: Sequence[torch.Tensor], rows: torch.Tensor) -> dict[Copy, _Work]:
    """Products with the forms that are to be had and give the same results; small ones first."""
    works: dict[Copy, _Work] = {}
    expected = functional.linear(rows, weights[0]).float()
    is_wide = weights[0].dtype == torch.float32
    tolerance = 1e-3 if is_wide else 0.05
    for form in (Copy.REORDERED,) if is_wide else (Copy.REORDERED, Copy.PACKED, Copy.WIDENED):
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
