"""A decoder of plain layers: products of torch, and kernels of ours between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from loaderd.server.worker.engine.batching.attention import Attention
from loaderd.server.worker.engine.batching.forward import PlainLayer, can_flatten
from loaderd.server.worker.engine.batching.linear import product_of
from loaderd.server.worker.engine.batching.native.kernels import Kernels

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
        return self._layers[0].plain.queries_keys_values.type_of(rows)


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
    plain: PlainLayer
    size: int
    cached: torch.dtype
    first_norm: _Norm
    # Of queries and of keys; None without.
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    head_epsilon: float
    second_norm: _Norm

    def __call__(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        scratch: _Scratch,
        step: Attention,
    ) -> torch.Tensor:
        """Adds to `hidden` what the last layer left to be added, and returns what this one does."""
        kernels, plain, normed = self.kernels, self.plain, scratch.normed
        heads, both, tokens = plain.heads, plain.heads + plain.key_heads, len(hidden)
        kernels.add_and_norm(hidden, delta, self.first_norm.weight, self.first_norm.epsilon, normed)
        projected = plain.queries_keys_values(normed)
        turned = torch.empty((tokens, both + plain.key_heads, plain.dimensions), dtype=self.cached)
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
            plain.index, turned[:, :heads], turned[:, heads:both], turned[:, both:], plain.rule
        )
        delta = plain.output(attended.flatten(1))
        kernels.add_and_norm(
            hidden, delta, self.second_norm.weight, self.second_norm.epsilon, normed
        )
        gate_and_up = plain.gate_and_up(normed)
        gated = torch.empty((tokens, self.size), dtype=gate_and_up.dtype)
        kernels.silu_and_multiply(gate_and_up, gated)
        return plain.down(gated)


def _layer(index: int, layer: Any, window: int | None, kernels: Kernels) -> _Layer:
    attention = layer.self_attn
    of_heads = [
        _Norm.of(getattr(attention, name))
        for name in ("q_norm", "k_norm")
        if getattr(attention, name, None) is not None
    ]
    return _Layer(
        kernels=kernels,
        plain=PlainLayer.of(index, layer, window),
        size=layer.mlp.gate_proj.weight.shape[0],
        cached=attention.q_proj.weight.dtype,
        first_norm=_Norm.of(layer.input_layernorm),
        head_norms=(of_heads[0].weight, of_heads[1].weight) if of_heads else None,
        head_epsilon=of_heads[0].epsilon if of_heads else 0.0,
        second_norm=_Norm.of(layer.post_attention_layernorm),
    )
