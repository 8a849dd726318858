"""Which matrix kernels of torch to use for a model's weights on a CPU, found out by trying.

A product with one or two rows is as fast as memory gives the weights. torch's own matrix-vector
product comes near that on some CPUs, but is used for bfloat16 only while oneDNN is switched off;
on others FBGEMM does, which reads weights packed as float16 and computes in float32. For more rows
oneDNN is the fastest where the CPU has instructions for 16-bit numbers, about twice as fast with
weights that were reordered for it before, those of float32 too. Without such instructions torch's
own loops are five times slower than a float32 product; there FBGEMM is the fastest for any number
of rows, else the weights are widened to float32. None of this changes a result but that sums are
rounded once, at the end.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

FEW = 2
"""Rows up to which reading the weights takes longer than computing with them."""

_TRIED_ROWS = 16
_TRIES = 10
_GAIN = 1.1
_LOST = 2**-12
"""Largest error of a packed weight, as a share of the usual weight; bfloat16 rounds to 2**-9."""
_LAST_DIGIT = 2**-25
"""Largest error of a number that float16 rounds only because it is small."""


class Form(StrEnum):
    """How weights are multiplied: as they are, in two ways, or as a copy in another form."""

    OWN = "own"
    NATIVE = "native"
    REORDERED = "reordered"
    PACKED = "packed"
    WIDENED = "widened"

    def bytes_of(self, itemsize: int) -> int:
        """What the copy of a number takes; 0 for what is no copy.

        Args:
            itemsize: Bytes of the number itself.
        """
        return {Form.REORDERED: itemsize, Form.PACKED: 2, Form.WIDENED: 4}.get(self, 0)

    def type_of(self, weights: torch.dtype) -> torch.dtype:
        """What weights of some type are multiplied in."""
        return torch.float32 if self in (Form.PACKED, Form.WIDENED) else weights


_TEXTS = {
    Form.NATIVE: "as matrix-vector products",
    Form.REORDERED: "with weights reordered for oneDNN",
    Form.PACKED: "in float32 with weights packed as float16",
    Form.WIDENED: "in float32 with widened weights",
}
_FOR_16_BITS = frozenset({Form.PACKED, Form.WIDENED})


@dataclass(frozen=True, slots=True)
class LinearPolicy:
    """How a model's linear layers are computed.

    Attributes:
        few: For up to `FEW` rows.
        many: For other numbers of rows.
    """

    few: Form = Form.OWN
    many: Form = Form.OWN

    @property
    def activations(self) -> torch.dtype | None:
        """What goes from layer to layer at the least cost; None for the model's own type."""
        return torch.float32 if {self.few, self.many} & _FOR_16_BITS else None

    @property
    def is_all_copies(self) -> bool:
        """Whether the weights themselves are not multiplied."""
        return all(form.bytes_of(1) for form in (self.few, self.many))

    def bytes_of(self, itemsize: int) -> int:
        """What the copies of a number take together; see `Form.bytes_of`."""
        return sum(form.bytes_of(itemsize) for form in {self.few, self.many})

    def __str__(self) -> str:
        few, many = _TEXTS.get(self.few), _TEXTS.get(self.many)
        if self.few is self.many:
            told = many
        else:
            rest = "more" if few else f"more than {FEW} rows"
            told = ", ".join(
                [f"up to {FEW} rows {few}"] * bool(few) + [f"{rest} {many}"] * bool(many)
            )
        return f"linear layers: {told}" if told else ""


PLAIN = LinearPolicy()
"""As torch does it."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""From [..., inputs] of any type to [..., outputs] of the one that it is computed in."""


class UnfitWeightError(RuntimeError):
    """A form cannot hold the weight."""


def product(weight: torch.Tensor, bias: torch.Tensor | None, form: Form) -> Product:
    """The product with a weight, in some form.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        form: How.

    Raises:
        UnfitWeightError: The form cannot hold this weight.
        RuntimeError: This CPU, or this build of torch, has no such form.
        AttributeError: As above.
    """
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    match form:
        case Form.OWN:
            return _converted(weight.dtype, lambda inputs: functional.linear(inputs, weight, bias))
        case Form.NATIVE:
            return _converted(weight.dtype, partial(_native, weight=weight, bias=bias))
        case Form.REORDERED:
            return _converted(weight.dtype, _reordered(weight, bias))
    wide = None if bias is None else bias.float()
    make = _packed if form is Form.PACKED else _reordered
    return _converted(torch.float32, make(weight.float().contiguous(), wide))


def _converted(dtype: torch.dtype, multiply: Product) -> Product:
    return lambda inputs: multiply(inputs.to(dtype))


def _native(
    inputs: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    # The public switch touches other switches too, and warns of them.
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return functional.linear(inputs, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(was)


def _reordered(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    mine = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TRIED_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda inputs: multiply(inputs, mine, bias, "none", [], "")


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """FBGEMM's, of float32.

    Raises:
        UnfitWeightError: As float16 the weights are not what they were.
        RuntimeError: There is no FBGEMM.
    """
    # It has as many digits as the weights, and fewer exponents: what is too small is rounded.
    usual = weight.square().mean().sqrt()
    if not (weight.abs().max() <= torch.finfo(torch.float16).max and usual * _LOST >= _LAST_DIGIT):
        raise UnfitWeightError("float16 cannot hold the weights")
    mine = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return lambda inputs: multiply(inputs, mine)


def best_policy(weights: Sequence[torch.Tensor], room: float = math.inf) -> LinearPolicy:
    """Times the kernels, for a part of a second.

    Args:
        weights: Of one shape; together more than a cache holds, as those of a whole model are.
        room: Bytes that copies may take for each number of the weights.
    """
    itemsize = weights[0].itemsize
    *few, many = (
        weights[0].new_ones(1, rows, weights[0].shape[1])
        for rows in (*range(1, FEW + 1), _TRIED_ROWS)
    )
    with torch.inference_mode():
        products = _products(weights, many, room)
        native = products.pop(Form.NATIVE)
        best = _fastest(products, [many])
        # The same form for few rows takes no more memory: it stays unless another is better.
        order = {best: products[best], Form.NATIVE: native, **products}
        fits = [form for form in order if LinearPolicy(form, best).bytes_of(itemsize) <= room]
        return LinearPolicy(_fastest({form: order[form] for form in fits}, few), best)


def _products(
    weights: Sequence[torch.Tensor], rows: torch.Tensor, room: float
) -> dict[Form, list[Product]]:
    """Products in the forms that are to be had and give the same results; small ones first."""
    products: dict[Form, list[Product]] = {}
    expected = functional.linear(rows, weights[0]).float()
    is_wide = weights[0].dtype == torch.float32
    tolerance = 1e-3 if is_wide else 0.05
    for form in Form:
        if form.bytes_of(weights[0].itemsize) > room or (is_wide and form in _FOR_16_BITS):
            continue
        try:
            made = [product(weight, None, form) for weight in weights]
            found = made[0](rows).float()
        except (AttributeError, RuntimeError) as error:
            logger.info("no weights %s: %s", form.value, str(error).partition("\n")[0])
            continue
        if torch.allclose(expected, found, tolerance, tolerance):
            products[form] = made
        else:
            logger.warning("weights %s give other results", form.value)
    return products


def _fastest(products: Mapping[Form, Sequence[Product]], inputs: Sequence[torch.Tensor]) -> Form:
    """The fastest form, where each must be faster by some than those before it."""
    works = [partial(_multiply_all, each, inputs) for each in products.values()]
    forms, seconds = list(products), _seconds(works)
    best = 0
    for index, taken in enumerate(seconds):
        if _GAIN * taken < seconds[best]:
            best = index
    return forms[best]


def _multiply_all(products: Sequence[Product], inputs: Sequence[torch.Tensor]) -> None:
    for rows in inputs:
        for multiply in products:
            multiply(rows)


def _seconds(works: Sequence[Callable[[], None]]) -> list[float]:
    """The shortest of some runs of each, in turns: what slows the box down slows all of them."""
    best = [math.inf] * len(works)
    for _ in range(_TRIES):
        for index, work in enumerate(works):
            begin = time.perf_counter()
            work()
            best[index] = min(best[index], time.perf_counter() - begin)
    return best
