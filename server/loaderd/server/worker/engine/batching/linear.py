"""Linear layers of 16-bit models on a CPU: few rows go to one kernel, many to another.

torch has a matrix-vector product that reads weights about as fast as memory gives them, but
uses it for bfloat16 only while oneDNN is switched off; and oneDNN multiplies more rows about
twice as fast when the weights were reordered for it before. So weights are kept twice: as they
are, and reordered. Layers with the same input become one.
"""

from __future__ import annotations

import logging
import time
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
_TRIES = 7
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
    """Replaces the model's linear layers where trials show that it pays.

    Args:
        model: Changed in place; left as it is on accelerators and in 32 bit.
        free_bytes: What reordered copies of the weights may take.

    Returns:
        What was done, for `Runner`.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D)]
    weights = [layer.weight for layer in layers]
    if not weights or not all(_is_ours(weight) for weight in weights):
        return LinearPolicy()
    needed = sum(weight.nbytes for weight in weights)
    with torch.inference_mode():
        policy = _try(
            max(
                (layer.weight for layer in layers if _is_typical(layer)),
                key=torch.numel,
                default=weights[0],
            )
        )
    if policy.reordered and needed > free_bytes:
        policy = LinearPolicy(native_few=policy.native_few)
    if policy.reordered:
        with torch.no_grad():
            _replace(model)
    return policy


class HybridLinear(nn.Module):  # type: ignore[misc]
    """A linear layer with its weights in both forms.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self._reordered = _reordered(weight)

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
        if not torch._C._get_mkldnn_enabled():
            return functional.linear(inputs, self.weight, self.bias)
        return _multiply(inputs, self._reordered, self.bias)


class _Siblings:
    """Layers with the same input, computed as one when the first of them is called."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.cat(biases)
        self._whole = HybridLinear(torch.cat([layer.weight for layer in layers]), bias)
        self._sizes = [layer.out_features for layer in layers]
        self._inputs: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []

    def parts(self) -> Iterator[_Part]:
        whole, sizes = self._whole, self._sizes
        biases = [None] * len(sizes) if whole.bias is None else whole.bias.split(sizes)
        for index, (weight, bias) in enumerate(zip(whole.weight.split(sizes), biases, strict=True)):
            yield _Part(self, index, weight, bias)

    def output(self, inputs: torch.Tensor, index: int) -> torch.Tensor:
        if inputs is not self._inputs:
            self._inputs = inputs
            self._outputs = list(self._whole(inputs).split(self._sizes, -1))
        output = self._outputs[index]
        if index == len(self._sizes) - 1:
            # The last one: what was computed is not needed any more.
            self._inputs, self._outputs = None, []
        return output


class _Part(nn.Module):  # type: ignore[misc]
    """One of some siblings; its weights are a view of theirs."""

    def __init__(
        self, siblings: _Siblings, index: int, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self._output = siblings.output
        self._index = index

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """This one's outputs."""
        return self._output(inputs, self._index)


def _replace(model: nn.Module) -> None:
    for module in list(model.modules()):
        for names in _SIBLINGS:
            layers = [module._modules.get(name) for name in names]
            if _are_siblings(layers):
                parts = _Siblings(layers).parts()
                for name, part in zip(names, parts, strict=True):
                    setattr(module, name, part)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, HybridLinear(child.weight, child.bias))
            elif type(child) is Conv1D:
                setattr(module, name, HybridLinear(child.weight.t().contiguous(), child.bias))


def _are_siblings(layers: Sequence[nn.Module | None]) -> bool:
    return (
        all(type(layer) is nn.Linear for layer in layers)
        and len({layer.in_features for layer in layers}) == 1  # type: ignore[union-attr]
        and len({layer.bias is None for layer in layers}) == 1  # type: ignore[union-attr]
    )


def _is_ours(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in {torch.bfloat16, torch.float16}


def _is_typical(layer: nn.Module) -> bool:
    """Not the output layer, which is much larger than all others."""
    weight = layer.weight
    return bool(weight.shape[0] < 8 * weight.shape[1])


def _try(weight: torch.Tensor) -> LinearPolicy:
    """Times the kernels on one layer, for a part of a second at most."""
    one, many = (weight.new_ones(1, rows, weight.shape[1]) for rows in (1, _TRIED_ROWS))
    try:
        reordered = _reordered(weight)
        expected, found = functional.linear(many, weight), _multiply(many, reordered, None)
        if not torch.allclose(expected.float(), found.float(), rtol=0.05, atol=0.05):
            raise RuntimeError("reordered weights give other results")
        with _without_onednn():
            native = _seconds(lambda: functional.linear(one, weight))
    except (AttributeError, RuntimeError) as error:
        # Not in this build of torch, or not for this CPU.
        logger.warning("linear layers are left as they are: %s", str(error).partition("\n")[0])
        return LinearPolicy()
    gain = _seconds(lambda: functional.linear(many, weight)) / _seconds(
        lambda: _multiply(many, reordered, None)
    )
    is_reordered = gain > _GAIN
    other = _seconds(
        lambda: _multiply(one, reordered, None) if is_reordered else functional.linear(one, weight)
    )
    return LinearPolicy(native_few=other > _GAIN * native, reordered=is_reordered)


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


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of some runs, after one to get ready."""
    work()
    times = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


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
