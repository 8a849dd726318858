"""The model as a function from tokens to logits: as transformers runs it, or flat.

At one stream a step of a small model is more Python and dispatch than arithmetic: a module call
costs as much as a small operator, and transformers writes norms and rotary embeddings as many of
them. For the plainest and most common kind of layer, the sequence of operators is written down
here, with the same rounding, fewer operators and no module calls. Whether it computes the same is
tried with the model itself when it is loaded, see suitability.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from loaderd.server.worker.engine.batching.attention import Attention, attending
from loaderd.server.worker.engine.batching.attention_kernels import Rule
from loaderd.server.worker.engine.batching.kernels import Product
from loaderd.server.worker.engine.batching.linear import Hybrid, Siblings, product_of

_LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
"""transformers' layers that are what `_Layer` computes."""


class Forward(Protocol):
    """Tokens in, logits out."""

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        step: Attention,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        """One forward pass.

        Args:
            token_ids: [tokens].
            positions: [tokens]; where in its own sequence each token is.
            step: Their attention.
            wanted: Places of the tokens that are to have logits; None for all.

        Returns:
            [wanted tokens, vocabulary].
        """


class ModuleForward:
    """transformers' own forward, of a model that has our attention function.

    Args:
        model: Any that takes it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._is_spread = len({parameter.device for parameter in model.parameters()}) > 1

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        step: Attention,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Forward`."""
        selection: dict[str, Any] = {}
        if self._selects and wanted is not None:
            # A tensor would be where the first layer is, and be needed where the last one is.
            selection["logits_to_keep"] = wanted.tolist() if self._is_spread else wanted
        with attending(step):
            logits: torch.Tensor = self._model(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                **selection,
            ).logits[0]
        if wanted is not None and not self._selects:
            logits = logits[wanted.to(logits.device)]
        return logits


class FlatForward:
    """A decoder of plain layers as one sequence of operators.

    Args:
        model: One that `can_flatten`.
        windows: By layer, how far it looks back; None for all the way.
        dtype: Of what goes from layer to layer; None for the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Mapping[int, int | None],
        dtype: torch.dtype | None = None,
    ) -> None:
        decoder = model.model
        self._embedding = decoder.embed_tokens.weight
        self._dtype = dtype or self._embedding.dtype
        self._rotary = decoder.rotary_emb
        self._layers = [
            _layer(index, layer, windows.get(index), self._dtype)
            for index, layer in enumerate(decoder.layers)
        ]
        self._norm = _norm(decoder.norm, self._dtype)
        self._head = product_of(model.lm_head)

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        step: Attention,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Forward`."""
        hidden = functional.embedding(token_ids, self._embedding)
        cos, sin = (part[0].unsqueeze(1) for part in self._rotary(hidden, positions.unsqueeze(0)))
        hidden = hidden.to(self._dtype)
        half = sin.shape[-1] // 2
        # With the sign in it, halves need only change places.
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        for layer in self._layers:
            hidden = layer(hidden, cos, sin, step)
        if wanted is not None:
            hidden = hidden[wanted]
        logits: torch.Tensor = self._head(self._norm(hidden))
        return logits


def can_flatten(model: PreTrainedModel) -> bool:
    """Whether it is made of layers that are known, in one place, and with siblings fused."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers or len({parameter.device for parameter in model.parameters()}) > 1:
        return False
    return all(
        type(layer).__name__ in _LAYERS
        and type(layer).__module__.startswith("transformers.models.")
        and Siblings.of(layer.self_attn.q_proj) is not None
        and Siblings.of(layer.mlp.gate_proj) is not None
        for layer in layers
    )


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """What a layer that `can_flatten` multiplies with, and how its heads attend.

    Attributes:
        index: Of the layer.
        rule: Of its attention.
        heads: Of queries.
        key_heads: Of keys and values.
        dimensions: Of a head.
        queries_keys_values: The product that has them side by side.
        output: The one behind attention.
        gate_and_up: The one that has both side by side.
        down: The last one.
    """

    index: int
    rule: Rule
    heads: int
    key_heads: int
    dimensions: int
    queries_keys_values: Hybrid
    output: Product
    gate_and_up: Hybrid
    down: Product

    @classmethod
    def of(cls, index: int, layer: Any, window: int | None) -> PlainLayer:
        """That of a layer of transformers.

        Raises:
            ValueError: Its siblings are not fused.
        """
        attention, mlp = layer.self_attn, layer.mlp
        dimensions = attention.head_dim
        fused, gated = Siblings.of(attention.q_proj), Siblings.of(mlp.gate_proj)
        if fused is None or gated is None:
            raise ValueError("only a model that can be flattened")
        return cls(
            index=index,
            rule=Rule(scaling=attention.scaling, window=window),
            heads=attention.q_proj.weight.shape[0] // dimensions,
            key_heads=attention.k_proj.weight.shape[0] // dimensions,
            dimensions=dimensions,
            queries_keys_values=fused.whole,
            output=product_of(attention.o_proj),
            gate_and_up=gated.whole,
            down=product_of(mlp.down_proj),
        )


_Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Attention and a gated perceptron, each after a norm and with a residual."""

    plain: PlainLayer
    first_norm: _Step
    # Of queries and keys, head by head; None without.
    head_norm: _Step | None
    second_norm: _Step
    activation: _Step

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: Attention
    ) -> torch.Tensor:
        """Changes `hidden` in place, and gives it back."""
        plain = self.plain
        heads, both = plain.heads, plain.heads + plain.key_heads
        projected = plain.queries_keys_values(self.first_norm(hidden)).to(cos.dtype)
        projected = projected.view(-1, both + plain.key_heads, plain.dimensions)
        turned = projected[:, :both]
        if self.head_norm is not None:
            turned = self.head_norm(turned)
        half = plain.dimensions // 2
        swapped = torch.cat((turned[..., half:], turned[..., :half]), -1)
        turned = turned * cos + swapped * sin
        attended = step.attend(
            plain.index, turned[:, :heads], turned[:, heads:], projected[:, both:], plain.rule
        )
        hidden += plain.output(attended.flatten(1))
        gate, up = plain.gate_and_up(self.second_norm(hidden)).chunk(2, -1)
        hidden += plain.down(self.activation(gate) * up)
        return hidden


def _layer(index: int, layer: Any, window: int | None, dtype: torch.dtype) -> _Layer:
    plain = PlainLayer.of(index, layer, window)
    return _Layer(
        plain=plain,
        first_norm=_norm(layer.input_layernorm, dtype),
        head_norm=_head_norm(layer.self_attn, plain.heads, plain.key_heads),
        second_norm=_norm(layer.post_attention_layernorm, dtype),
        activation=layer.mlp.act_fn.forward,
    )


def _norm(norm: Any, dtype: torch.dtype) -> _Step:
    return _root_mean_square(norm.weight.detach().to(dtype), norm.variance_epsilon)


def _head_norm(attention: Any, heads: int, key_heads: int) -> _Step | None:
    if getattr(attention, "q_norm", None) is None:
        return None
    weights = [
        norm.weight.detach().expand(count, -1)
        for norm, count in ((attention.q_norm, heads), (attention.k_norm, key_heads))
    ]
    return _root_mean_square(torch.cat(weights), attention.q_norm.variance_epsilon)


def _root_mean_square(weight: torch.Tensor, epsilon: float) -> _Step:
    shape = weight.shape[-1:]
    if weight.dtype != torch.float32:
        # Rounded before the weights are applied, as in transformers.
        return lambda hidden: functional.rms_norm(hidden, shape, None, epsilon) * weight
    # The same by the vector's length: four operators, where torch's function has seven.
    root = math.sqrt(shape.numel())
    scale, floor = weight * root, weight.new_tensor(root * math.sqrt(epsilon))

    def normalise(hidden: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        return hidden * scale / torch.hypot(length, floor)

    return normalise
