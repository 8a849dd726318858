"""Linear layers of 16-bit models on a CPU: few rows go to one kernel, many to another.

torch has a matrix-vector product that reads weights about as fast as memory gives them, but
uses it for bfloat16 only while oneDNN is switched off; and oneDNN multiplies more rows about
twice as fast when the weights were reordered for it before. So weights are kept twice: as they
are, and reordered. Layers with the same input become one.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

FEW = 2
"""Rows up to which the matrix-vector product is used."""

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that have one input where a module has them all."""
_TRIED_ROWS = 16
_TRIED_BYTES = 32 * 2**20
_TRIES = 4
_GAIN = 1.1


@dataclass(frozen=True, slots=True)
class LinearPolicy:
    """How a model's linear layers are computed.

    Attributes:
        native_few: Whether few rows are computed with oneDNN switched off.
        reordered: Whether many rows are computed with reordered weights.
    """

    native_few: bool = False
    reordered: bool = False

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """A forward pass of so many tokens."""
        if self.native_few and tokens <= FEW:
            with _without_onednn():
                yield
        else:
            yield

    def __str__(self) -> str:
        parts = [
            text
            for holds, text in (
                (self.native_few, f"up to {FEW} rows as matrix-vector products"),
                (self.reordered, "more with weights reordered for oneDNN"),
            )
            if holds
        ]
        return "linear layers: " + ", ".join(parts) if parts else ""


PLAIN = LinearPolicy()
"""As torch does it."""


def speed_up(model: nn.Module, free_bytes: int) -> LinearPolicy:
    """Fuses siblings, and on a CPU does what trials show to pay.

    Args:
        model: Changed in place, unless it is spread over devices.
        free_bytes: What reordered copies of the weights may take.

    Returns:
        What was done, for `Runner`.
    """
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return PLAIN  # its modules have hooks that move tensors between devices
    policy = _policy(model, free_bytes)
    with torch.no_grad():
        for module in list(model.modules()):
            _fuse(module, reorder=policy.reordered)
            if policy.reordered:
                _reorder(module)
    return policy


def _policy(model: nn.Module, free_bytes: int) -> LinearPolicy:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D)]
    weights = [layer.weight for layer in layers]
    if not weights or not all(map(_is_ours, weights)):
        return PLAIN
    with torch.inference_mode():
        policy = _try(_typical(layers))
    if policy.reordered and sum(weight.nbytes for weight in weights) > free_bytes:
        return LinearPolicy(native_few=policy.native_few)
    return policy


def _typical(layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Weights of one shape, the one that most weights have, up to a limit of bytes.

    Together they are more than a cache holds, as those of a whole model are.
    """
    shapes = Counter[tuple[int, ...]]()
    for layer in layers:
        shapes[tuple(layer.weight.shape)] += layer.weight.numel()
    shape = shapes.most_common(1)[0][0]
    same = [layer for layer in layers if tuple(layer.weight.shape) == shape]
    count = max(_TRIED_BYTES // same[0].weight.nbytes, 1)
    return [
        layer.weight.t().contiguous() if isinstance(layer, Conv1D) else layer.weight
        for layer in same[:count]
    ]


class HybridLinear(nn.Module):  # type: ignore[misc]
    """A linear layer, maybe with its weights in both forms.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        reorder: Whether to have both.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, reorder: bool) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self._reordered = _reordered(weight) if reorder else None

    @property
    def in_features(self) -> int:
        """Inputs."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Outputs."""
        return int(self.weight.shape[0])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layer's outputs."""
        if self._reordered is None or not torch._C._get_mkldnn_enabled():
            return functional.linear(inputs, self.weight, self.bias)
        return _multiply(inputs, self._reordered, self.bias)


class Siblings:
    """Layers with the same input, computed as one when the first of them is called.

    Args:
        layers: The layers, in the order in which they are called.
        reorder: See `HybridLinear`.

    Attributes:
        whole: All of them; their outputs side by side.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, reorder: bool) -> None:
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.cat(biases)
        weight = torch.cat([layer.weight for layer in layers])
        self.whole = HybridLinear(weight, bias, reorder=reorder)
        self._sizes = [layer.out_features for layer in layers]
        self._inputs: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []

    @staticmethod
    def of(layer: nn.Module) -> Siblings | None:
        """Those that a layer is one of."""
        return layer.siblings if isinstance(layer, _Part) else None

    def parts(self) -> Iterator[nn.Module]:
        """What takes the layers' places; their weights are views of the whole's."""
        whole, sizes = self.whole, self._sizes
        biases = [None] * len(sizes) if whole.bias is None else whole.bias.split(sizes)
        for index, (weight, bias) in enumerate(zip(whole.weight.split(sizes), biases, strict=True)):
            yield _Part(self, index, weight, bias)

    def output(self, inputs: torch.Tensor, index: int) -> torch.Tensor:
        """The outputs of one of the layers."""
        if inputs is not self._inputs:
            self._inputs = inputs
            self._outputs = list(self.whole(inputs).split(self._sizes, -1))
        output = self._outputs[index]
        if index == len(self._sizes) - 1:
            # The last one: what was computed is not needed any more.
            self._inputs, self._outputs = None, []
        return output


class _Part(nn.Module):  # type: ignore[misc]
    """One of some siblings."""

    def __init__(
        self, siblings: Siblings, index: int, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self.siblings = siblings
        self._index = index

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """This one's outputs."""
        return self.siblings.output(inputs, self._index)


def _fuse(module: nn.Module, *, reorder: bool) -> None:
    for names in _SIBLINGS:
        layers = [module._modules.get(name) for name in names]
        if _are_siblings(layers):
            parts = Siblings(layers, reorder=reorder).parts()
            for name, part in zip(names, parts, strict=True):
                setattr(module, name, part)


def _reorder(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, HybridLinear(child.weight, child.bias, reorder=True))
        elif type(child) is Conv1D:
            weight = child.weight.t().contiguous()
            setattr(module, name, HybridLinear(weight, child.bias, reorder=True))


def _are_siblings(layers: Sequence[nn.Module | None]) -> bool:
    return (
        all(type(layer) is nn.Linear for layer in layers)
        and len({layer.in_features for layer in layers}) == 1  # type: ignore[union-attr]
        and len({layer.bias is None for layer in layers}) == 1  # type: ignore[union-attr]
    )


def _is_ours(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in {torch.bfloat16, torch.float16}


def _try(weights: Sequence[torch.Tensor]) -> LinearPolicy:
    """Times the kernels, for a part of a second."""
    one, many = (weights[0].new_ones(1, rows, weights[0].shape[1]) for rows in (1, _TRIED_ROWS))
    try:
        reordered = [_reordered(weight) for weight in weights]
        expected = functional.linear(many, weights[0]).float()
        if not torch.allclose(expected, _multiply(many, reordered[0], None).float(), 0.05, 0.05):
            raise RuntimeError("reordered weights give other results")
        with _without_onednn():
            functional.linear(one, weights[0])
    except (AttributeError, RuntimeError) as error:
        # Not in this build of torch, or not for this CPU.
        logger.warning("linear layers are left as they are: %s", str(error).partition("\n")[0])
        return PLAIN

    def plain(rows: torch.Tensor) -> None:
        for weight in weights:
            functional.linear(rows, weight)

    def packed(rows: torch.Tensor) -> None:
        for weight in reordered:
            _multiply(rows, weight, None)

    def native(rows: torch.Tensor) -> None:
        with _without_onednn():
            plain(rows)

    slow, fast = _seconds([lambda: plain(many), lambda: packed(many)])
    few = _seconds([lambda: native(one), lambda: plain(one), lambda: packed(one)])
    is_reordered = slow > _GAIN * fast
    return LinearPolicy(native_few=few[2 if is_reordered else 1] > few[0], reordered=is_reordered)


@contextmanager
def _without_onednn() -> Iterator[None]:
    # The public switch touches other switches too, and warns of them.
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    """Tied weights stay one parameter."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def _seconds(works: Sequence[Callable[[], None]]) -> list[float]:
    """The shortest of some runs of each, in turns: what slows the box down slows all of them."""
    best = [math.inf] * len(works)
    for _ in range(_TRIES):
        for index, work in enumerate(works):
            begin = time.perf_counter()
            work()
            best[index] = min(best[index], time.perf_counter() - begin)
    return best


def _reordered(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach().contiguous(), _TRIED_ROWS
    )
    return packed


def _multiply(
    inputs: torch.Tensor, reordered: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        inputs, reordered, bias, "none", [], ""
    )
    return product
