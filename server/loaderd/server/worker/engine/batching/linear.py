"""Linear layers on a CPU, computed with the kernels that pay; see kernels.py.

Layers with the same input become one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from loaderd.server.worker.engine.batching.kernels import (
    PLAIN,
    CopiedWeight,
    Copy,
    LinearPolicy,
    UnfitWeightError,
    best_policy,
    uses_copies,
)
from loaderd.server.worker.quantization import is_quantized

logger = logging.getLogger(__name__)

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that have one input where a module has them all."""
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_LEAST_BYTES = 8 * 2**20
"""Smaller models stay in a cache, where no copy of their weights pays."""
_TRIED_BYTES = 32 * 2**20


def speed_up(model: nn.Module, free_bytes: int) -> LinearPolicy:
    """Fuses siblings, and on a CPU does what trials show to pay.

    Args:
        model: Changed in place, unless it is spread over devices.
        free_bytes: What copies of the weights may take.

    Returns:
        What was done, for `Runner`.
    """
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return PLAIN  # its modules have hooks that move tensors between devices
    policy = _policy(model, free_bytes)
    with torch.no_grad():
        for module in list(model.modules()):
            _fuse(module, policy.copy)
            if policy.copy is not Copy.NONE:
                _copy_weights(module, policy.copy)
    return policy


def _policy(model: nn.Module, free_bytes: int) -> LinearPolicy:
    layers = [layer for layer in model.modules() if _has_plain_weights(layer)]
    weights = [layer.weight for layer in layers]
    if (
        not weights
        or not all(map(_is_ours, weights))
        or sum(each.nbytes for each in weights) < _LEAST_BYTES
    ):
        return PLAIN
    policy = best_policy(_typical(layers))
    if sum(map(policy.copy.bytes_of, weights)) > free_bytes:
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
    """A linear layer, maybe with its weights in a second form.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        form: The second one, if any.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, form: Copy) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self._copy = _copied(weight, bias, form)

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
        if self._copy is None or not uses_copies():
            own = functional.linear(inputs.to(self.weight.dtype), self.weight, self.bias)
            return own.to(inputs.dtype)
        return self._copy.multiply(inputs)


def _copied(weight: torch.Tensor, bias: torch.Tensor | None, form: Copy) -> CopiedWeight | None:
    """The copy; None where there is to be none, or it cannot be."""
    if form is Copy.NONE:
        return None
    try:
        return CopiedWeight(weight, bias, form)
    except UnfitWeightError as error:
        logger.info("a layer of %s stays as it is: %s", tuple(weight.shape), error)
        return None


class Siblings:
    """Layers with the same input, computed as one when the first of them is called.

    Args:
        layers: The layers, in the order in which they are called.
        form: See `HybridLinear`.

    Attributes:
        whole: All of them; their outputs side by side.
    """

    def __init__(self, layers: Sequence[nn.Linear], form: Copy) -> None:
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.cat(biases)
        weight = torch.cat([layer.weight for layer in layers])
        self.whole = HybridLinear(weight, bias, form)
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


def _fuse(module: nn.Module, form: Copy) -> None:
    for names in _SIBLINGS:
        layers = [module._modules.get(name) for name in names]
        if _are_siblings(layers):
            parts = Siblings(layers, form).parts()
            for name, part in zip(names, parts, strict=True):
                setattr(module, name, part)


def _copy_weights(module: nn.Module, form: Copy) -> None:
    for name, child in list(module.named_children()):
        if not _has_plain_weights(child):
            continue
        if type(child) is nn.Linear:
            setattr(module, name, HybridLinear(child.weight, child.bias, form))
        elif type(child) is Conv1D:
            weight = child.weight.t().contiguous()
            setattr(module, name, HybridLinear(weight, child.bias, form))


def _are_siblings(layers: Sequence[nn.Module | None]) -> bool:
    return (
        all(type(layer) is nn.Linear and _has_plain_weights(layer) for layer in layers)
        and len({layer.in_features for layer in layers}) == 1  # type: ignore[union-attr]
        and len({layer.bias is None for layer in layers}) == 1  # type: ignore[union-attr]
    )


def _has_plain_weights(layer: nn.Module) -> bool:
    """Those that are quantized know best how to multiply."""
    return isinstance(layer, nn.Linear | Conv1D) and not is_quantized(layer.weight)


def _is_ours(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in _DTYPES


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    """Tied weights stay one parameter."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
