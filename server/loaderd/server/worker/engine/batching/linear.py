"""Linear layers on a CPU, computed with the kernels that pay; see kernels.py.

Layers with the same input become one.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loaderd.server.worker.engine.batching.kernels import (
    FEW,
    PLAIN,
    Form,
    LinearPolicy,
    Product,
    UnfitWeightError,
    best_policy,
    product,
)
from loaderd.server.worker.engine.batching.mapped import is_mapped
from loaderd.server.worker.quantization import is_quantized

logger = logging.getLogger(__name__)

_Weights = tuple[torch.Tensor, torch.Tensor | None]
"""[outputs, inputs], and [outputs] or None."""

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that have one input where a module has them all."""
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_LEAST_BYTES = 8 * 2**20
"""Smaller models stay in a cache, where no copy of their weights pays."""
_TRIED_BYTES = 32 * 2**20
_LAST = 19
"""The lowest priority of a thread, as of `nice`."""


def fastest(model: nn.Module) -> LinearPolicy:
    """Finds out by trying how a model's linear layers are computed fastest where it is."""
    layers = _layers(model)
    if (
        not layers
        or not all(_is_ours(layer.weight) for layer in layers)
        or sum(layer.weight.nbytes for layer in layers) < _LEAST_BYTES
    ):
        return PLAIN
    return best_policy(_typical(layers))


class Linears:
    """A model's linear layers, as a policy says.

    They multiply from the begin on, with the weights as they are until there are copies.

    Args:
        policy: How they are computed.
        layers: Those with weights of their own.
        are_mapped: Whether these weights are parts of mapped files.
    """

    def __init__(
        self, policy: LinearPolicy, layers: Sequence[Hybrid], *, are_mapped: bool = False
    ) -> None:
        self.policy = policy
        self._layers = layers
        self._are_mapped = are_mapped

    @property
    def missing_bytes(self) -> int:
        """What the copies that are still to be made will take."""
        copies = sum(layer.missing_bytes for layer in self._layers)
        if not self._are_mapped:
            return copies
        return copies + sum(layer.joined_bytes for layer in self._layers)

    def make_copies_beside(self) -> None:
        """Makes them in a thread of its own, which waits for all others."""
        if self.missing_bytes:
            threading.Thread(target=self._make_copies_last, name="copies", daemon=True).start()

    def _make_copies_last(self) -> None:
        if sys.platform == "linux":  # elsewhere it would be for the whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LAST)
        self.make_copies()

    def make_copies(self) -> None:
        """Makes them, which may take longer than loading the weights did."""
        with torch.inference_mode():
            for layer in self._layers:
                layer.make_copies()


def speed_up(model: nn.Module, policy: LinearPolicy, free_bytes: int) -> Linears:
    """Fuses siblings, and computes linear layers as a policy says.

    Args:
        model: Changed in place, unless it is spread over devices.
        policy: See `fastest`.
        free_bytes: What copies of the weights may take; where they would take more, those that
            fit are tried.

    Returns:
        What was done.
    """
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return Linears(PLAIN, ())  # its modules have hooks that move tensors between devices
    layers = _layers(model)
    if policy != PLAIN and layers:
        room = free_bytes / sum(layer.weight.numel() for layer in layers)
        if policy.bytes_of(layers[0].weight.itemsize) > room:
            policy = best_policy(_typical(layers), room)
    are_mapped = bool(layers) and is_mapped(layers[0].weight)
    hybrids: list[Hybrid] = []
    with torch.no_grad():
        for module in list(model.modules()):
            hybrids += _fuse(module, policy)
            if policy != PLAIN:
                hybrids += _replace(module, policy)
    return Linears(policy, hybrids, are_mapped=are_mapped)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if _has_plain_weights(layer)]


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


class Hybrid:
    """A product that is computed in one way for few rows and in another for many.

    Args:
        parts: The weights and biases of layers whose outputs stand side by side. They become one
            with the policy's copies; those of a policy that has none are best made one before.
        policy: The ways.
        on_join: Called with the one weight and bias that several became, if they are multiplied
            themselves.
    """

    def __init__(
        self,
        parts: Sequence[_Weights],
        policy: LinearPolicy,
        on_join: Callable[[torch.Tensor, torch.Tensor | None], None] = lambda *_: None,
    ) -> None:
        self._policy = policy
        self._on_join = on_join
        weights = [weight for weight, _ in parts]
        numbers = sum(weight.numel() for weight in weights)
        self._copied_bytes = policy.bytes_of(weights[0].itemsize) * numbers
        self._source = parts if self._copied_bytes else ()
        is_joined = len(parts) > 1 and not policy.is_all_copies
        self._joined_bytes = sum(weight.nbytes for weight in weights) if is_joined else 0
        own = _side_by_side(parts, Form.OWN)
        self._few = _side_by_side(parts, Form.NATIVE) if policy.few is Form.NATIVE else own
        self._many = _side_by_side(parts, Form.NATIVE) if policy.many is Form.NATIVE else own
        self._few_type = self._many_type = parts[0][0].dtype

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """See `Product`."""
        multiply = self._few if inputs.shape[:-1].numel() <= FEW else self._many
        return multiply(inputs)

    def type_of(self, rows: int) -> torch.dtype:
        """What so many rows are multiplied in: inputs of this type are not converted."""
        return self._few_type if rows <= FEW else self._many_type

    @property
    def missing_bytes(self) -> int:
        """What the policy's copies will take; 0 when there are none to be made."""
        return self._copied_bytes if self._source else 0

    @property
    def joined_bytes(self) -> int:
        """What the one weight will take that several become; theirs are let go for it."""
        return self._joined_bytes if self._source else 0

    def make_copies(self) -> None:
        """From now on the policy holds; a weight that a form cannot hold stays as it is."""
        source, self._source = self._source, ()  # else its memory would stay
        if not source:
            return
        weight, bias = _joined(source)
        try:
            made = {
                form: product(weight, bias, form) for form in {self._policy.few, self._policy.many}
            }
        except UnfitWeightError as error:
            logger.info("a layer of %s stays as it is: %s", tuple(weight.shape), error)
        else:
            few, many = self._policy.few, self._policy.many
            self._few, self._many = made[few], made[many]
            if self._joined_bytes:
                self._on_join(weight, bias)
            self._few_type, self._many_type = few.type_of(weight.dtype), many.type_of(weight.dtype)


class HybridLinear(nn.Module):  # type: ignore[misc]
    """A linear layer computed as a policy says.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
        policy: See `Hybrid`.

    Attributes:
        hybrid: Computes it.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, policy: LinearPolicy
    ) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self.hybrid = Hybrid([(weight, bias)], policy)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """From [..., inputs] to [..., outputs], of the same type."""
        return self.hybrid(inputs).to(inputs.dtype)


def product_of(layer: nn.Module) -> Product:
    """What a linear layer computes, without a conversion to the type of what goes in."""
    if isinstance(layer, HybridLinear):
        return layer.hybrid
    if not layer.weight.is_floating_point():
        # Whole numbers with scales, which it knows how to multiply.
        return layer  # type: ignore[no-any-return]
    return lambda inputs: layer(inputs.to(layer.weight.dtype))


class Siblings:
    """Layers with the same input, computed as one when the first of them is called.

    Args:
        layers: The layers, in the order in which they are called.
        policy: See `Hybrid`.

    Attributes:
        whole: All of them; their outputs side by side.
        parts: What takes the layers' places.
    """

    def __init__(self, layers: Sequence[nn.Linear], policy: LinearPolicy) -> None:
        self._sizes = [layer.out_features for layer in layers]
        weights: list[_Weights] = [(layer.weight, layer.bias) for layer in layers]
        self.parts = [_Part(self, index, *each) for index, each in enumerate(weights)]
        if policy.bytes_of(1):
            # They become one where copies are made, for which no load waits.
            self.whole = Hybrid(weights, policy, self._hold)
        else:
            joined = _joined(weights)
            self.whole = Hybrid([joined], policy)
            self._hold(*joined)
        self._inputs: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []

    @staticmethod
    def of(layer: nn.Module) -> Siblings | None:
        """Those that a layer is one of."""
        return layer.siblings if isinstance(layer, _Part) else None

    def _hold(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Lets go of the layers' own weights, which are parts of this one now."""
        biases = [None] * len(self.parts) if bias is None else bias.split(self._sizes)
        for part, *each in zip(self.parts, weight.split(self._sizes), biases, strict=True):
            part.hold(*each)

    def output(self, inputs: torch.Tensor, index: int) -> torch.Tensor:
        """The outputs of one of the layers."""
        if inputs is not self._inputs:
            self._inputs = inputs
            outputs = self.whole(inputs).to(inputs.dtype)
            self._outputs = list(outputs.split(self._sizes, -1))
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
        self.siblings = siblings
        self._index = index
        self.hold(weight, bias)

    def hold(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Has these as its weights from now on."""
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """This one's outputs."""
        return self.siblings.output(inputs, self._index)


def _joined(parts: Sequence[_Weights]) -> _Weights:
    """The weights and biases of several layers as those of one."""
    if len(parts) == 1:
        return parts[0]
    weights, biases = zip(*parts, strict=True)
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def _side_by_side(parts: Sequence[_Weights], form: Form) -> Product:
    """The product that has the outputs of several side by side."""
    products = [product(weight, bias, form) for weight, bias in parts]
    if len(products) == 1:
        return products[0]
    return lambda inputs: torch.cat([multiply(inputs) for multiply in products], -1)


def _fuse(module: nn.Module, policy: LinearPolicy) -> Iterator[Hybrid]:
    for names in _SIBLINGS:
        layers = [module._modules.get(name) for name in names]
        if _are_siblings(layers):
            siblings = Siblings(layers, policy)
            for name, part in zip(names, siblings.parts, strict=True):
                setattr(module, name, part)
            yield siblings.whole


def _replace(module: nn.Module, policy: LinearPolicy) -> Iterator[Hybrid]:
    for name, child in list(module.named_children()):
        if not _has_plain_weights(child) or type(child) not in {nn.Linear, Conv1D}:
            continue
        weight = child.weight.t().contiguous() if type(child) is Conv1D else child.weight
        linear = HybridLinear(weight, child.bias, policy)
        setattr(module, name, linear)
        yield linear.hybrid


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
