"""A decoder of plain layers: products of torch, and kernels of ours between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from loaderd.server.worker.engine.batching.attention import Attention
from loaderd.server.worker.engine.batching.attention_kernels import Rule
from loaderd.server.worker.engine.batching.forward import can_flatten
from loaderd.server.worker.engine.batching.linear import Hybrid, Siblings, product_of
from loaderd.server.worker.engine.batching.native.kernels import Kernels

_Product = Callable[[torch.Tensor], torch.Tensor]
_MOST_DIMENSIONS = 4096
"""Of a head: some of them are on a thread's stack."""


def can_run(model: PreTrainedModel) -> bool:
    """Whether it is on the CPU, and made of layers that `NativeForward` computes."""
    return (
        can_flatten(model)
        and model.device.type == "cpu"
        and all(
            type(layer.mlp.act_fn) is SiLUActivation
            and layer.self_attn.head_dim <= _MOST_DIMENSIONS
            for layer in model.model.layers
        )
    )


class NativeForward:
    """The same as `FlatForward`, in five kernels a layer.

    The residual is float32 whatever the model's type is. Keys and values are of the model's type.

    Args:
        model: One that `can_run`.
        windows: By layer, how far it looks back; None for all the way.
        kernels: Ours.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Mapping[int, int | None], kernels: Kernels
    ) -> None:
        decoder = model.model
        self._kernels = kernels
        self._embedding = decoder.embed_tokens.weight
        self._rotary = decoder.rotary_emb
        self._layers = [
            _layer(index, layer, windows.get(index), kernels)
            for index, layer in enumerate(decoder.layers)
        ]
        self._norm = _Norm.of(decoder.norm)
        self._head = product_of(model.lm_head)

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        step: Attention,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Forward`."""
        hidden = functional.embedding(token_ids, self._embedding).float()
        cosines, sines = (
            part[0, :, : part.shape[-1] // 2].contiguous()
            for part in self._rotary(hidden, positions.unsqueeze(0))
        )
        normed = torch.empty(hidden.shape, dtype=self._type_for(len(hidden)))
        scratch = _Scratch(cosines, sines, normed)
        delta = None
        for layer in self._layers:
            delta = layer(hidden, delta, scratch, step)
        if wanted is not None:
            hidden, delta = hidden[wanted], None if delta is None else delta[wanted]
        normed = torch.empty(hidden.shape, dtype=self._type_for(len(hidden)))
        self._kernels.add_and_norm(hidden, delta, self._norm.weight, self._norm.epsilon, normed)
        return self._head(normed)

    def _type_for(self, rows: int) -> torch.dtype:
        """What the products of so many rows take without a conversion."""
        return self._layers[0].queries_keys_values.type_of(rows)


@dataclass(frozen=True, slots=True)
class _Scratch:
    """What all layers of a step use.

    Attributes:
        cosines: [tokens, dimensions / 2], as `sines`.
        normed: [tokens, size], of the type that the layers' products take.
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    normed: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> _Norm:
        return cls(norm.weight.detach().float().contiguous(), norm.variance_epsilon)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Attention and a gated perceptron, each after a norm and with a residual."""

    kernels: Kernels
    index: int
    rule: Rule
    heads: int
    key_heads: int
    dimensions: int
    size: int
    cached: torch.dtype
    first_norm: _Norm
    queries_keys_values: Hybrid
    # Of queries and of keys; None without.
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    head_epsilon: float
    output: _Product
    second_norm: _Norm
    gate_and_up: _Product
    down: _Product

    def __call__(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        scratch: _Scratch,
        step: Attention,
    ) -> torch.Tensor:
        """Adds to `hidden` what the last layer left to be added, and returns what this one does."""
        kernels, normed, heads = self.kernels, scratch.normed, self.heads
        both, tokens = heads + self.key_heads, len(hidden)
        kernels.add_and_norm(hidden, delta, self.first_norm.weight, self.first_norm.epsilon, normed)
        projected = self.queries_keys_values(normed)
        turned = torch.empty((tokens, both + self.key_heads, self.dimensions), dtype=self.cached)
        kernels.turn(
            projected,
            scratch.cosines,
            scratch.sines,
            turned,
            heads=heads,
            head_norms=self.head_norms,
            epsilon=self.head_epsilon,
        )
        attended = step.attend(
            self.index, turned[:, :heads], turned[:, heads:both], turned[:, both:], self.rule
        )
        delta = self.output(attended.flatten(1))
        kernels.add_and_norm(
            hidden, delta, self.second_norm.weight, self.second_norm.epsilon, normed
        )
        gate_and_up = self.gate_and_up(normed)
        gated = torch.empty((tokens, self.size), dtype=gate_and_up.dtype)
        kernels.silu_and_multiply(gate_and_up, gated)
        return self.down(gated)


def _layer(index: int, layer: Any, window: int | None, kernels: Kernels) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    dimensions = attention.head_dim
    queries, keys = attention.q_proj.weight.shape[0], attention.k_proj.weight.shape[0]
    fused, gated = Siblings.of(attention.q_proj), Siblings.of(mlp.gate_proj)
    if fused is None or gated is None:
        raise ValueError("only a model that can be flattened")
    of_heads = [
        _Norm.of(getattr(attention, name))
        for name in ("q_norm", "k_norm")
        if getattr(attention, name, None) is not None
    ]
    return _Layer(
        kernels=kernels,
        index=index,
        rule=Rule(scaling=attention.scaling, window=window),
        heads=queries // dimensions,
        key_heads=keys // dimensions,
        dimensions=dimensions,
        size=mlp.gate_proj.weight.shape[0],
        cached=attention.q_proj.weight.dtype,
        first_norm=_Norm.of(layer.input_layernorm),
        queries_keys_values=fused.whole,
        head_norms=(of_heads[0].weight, of_heads[1].weight) if of_heads else None,
        head_epsilon=of_heads[0].epsilon if of_heads else 0.0,
        output=product_of(attention.o_proj),
        second_norm=_Norm.of(layer.post_attention_layernorm),
        gate_and_up=gated.whole,
        down=product_of(mlp.down_proj),
    )
