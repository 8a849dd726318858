"""What attention is computed with: by device, by shape, and by what a layer wants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

_MANY_ROWS = 16
"""From here on a CPU computes rows of float32 faster by batched products than by torch's function,
which takes one head of one row after the other."""

# On newer GPUs torch would prefer cuDNN, which takes milliseconds to prepare for each new shape:
# here, and where transformers generates, the keys are one more at every step.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a layer wants of its attention.

    Attributes:
        scaling: Of the scores; None for the usual one.
        window: Most tokens that a token looks back on, itself included; None for all.
        softcap: Bound of the scores; None for none.
        sinks: A score for each head that takes part in the softmax and brings no value.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's function can do it."""
        return self.softcap is None and self.sinks is None

    def scale(self, dimensions: int) -> float:
        """Of the scores of heads with so many dimensions."""
        return dimensions**-0.5 if self.scaling is None else self.scaling


def seen_mask(
    positions: torch.Tensor, begin: int, end: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """0 where a token may look, else minus infinity.

    Args:
        positions: [..., 1]; of the tokens.
        begin: Position of the first key.
        end: Behind that of the last one.
        window: See `Rule`.
        dtype: Of the mask.

    Returns:
        [..., keys].
    """
    others = torch.arange(begin, end, device=positions.device)
    seen = others <= positions
    if window is not None:
        seen &= others > positions - window
    mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(~seen, -torch.inf)


def attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    rule: Rule,
) -> torch.Tensor:
    """Attention of one token in each of some rows.

    Args:
        query: [rows, heads, dimensions].
        keys: [rows, key heads, tokens before and itself, dimensions].
        values: As `keys`.
        mask: [rows, 1, 1, keys], or None.
        rule: How.

    Returns:
        [rows, heads, dimensions].
    """
    # The heads that share keys stand where the queries of one head would.
    grouped = query.unflatten(1, (keys.shape[1], -1))
    if not rule.is_plain or query.is_cuda:
        # On a GPU torch's function leaves most of it idle where it has few rows and a mask.
        output = _attention(grouped.unsqueeze(3), keys, values, mask, rule).squeeze(3)
    elif len(query) >= _MANY_ROWS and keys.dtype == torch.float32 and keys.device.type == "cpu":
        output = _plain_attention(grouped, keys, values, mask, rule)
    else:
        output = scaled_dot_product_attention(
            grouped, keys, values, attn_mask=mask, scale=rule.scaling
        )
    return output.flatten(1, 2)


def attend_prompt(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    rule: Rule,
) -> torch.Tensor:
    """Attention of consecutive tokens.

    Args:
        query: [1, heads, tokens, dimensions].
        keys: [1, key heads, tokens before and themselves, dimensions].
        values: As `keys`.
        mask: [1, 1, tokens, keys]; None where all keys are these tokens', and the rule is plain.
        rule: How.

    Returns:
        [1, heads, tokens, dimensions].
    """
    grouped = query.unflatten(1, (keys.shape[1], -1))
    if not rule.is_plain:
        return _attention(grouped, keys, values, mask, rule).flatten(1, 2)
    if mask is not None and query.is_cuda:
        # There torch has no fast function for masks and shared keys together.
        tiled = mask.repeat(1, 1, grouped.shape[2], 1)
        output = scaled_dot_product_attention(
            grouped.flatten(2, 3), keys, values, attn_mask=tiled, scale=rule.scaling
        )
        return output.unflatten(2, grouped.shape[2:4]).flatten(1, 2)
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=rule.scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def _plain_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    rule: Rule,
) -> torch.Tensor:
    """In three operators; shapes as those of torch's function."""
    scaling = rule.scale(query.shape[-1])
    scores = query * scaling @ keys.transpose(2, 3)
    if mask is not None:
        scores += mask
    return scores.softmax(-1) @ values


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    rule: Rule,
) -> torch.Tensor:
    """Step by step, for what torch's function lacks.

    Args:
        query: [rows, key heads, heads of a key head, tokens, dimensions].
        keys: [rows, key heads, tokens before, dimensions].
        values: As `keys`.
        mask: [rows, 1, tokens, tokens before].
        rule: How.
    """
    scaling = rule.scale(query.shape[-1])
    # What shares keys is one matrix: none of them is copied.
    products = _products(query.flatten(2, 3).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    scores = products.view(*query.shape[:-1], -1)
    if rule.softcap is not None:
        scores = torch.tanh(scores * (scaling / rule.softcap)) * rule.softcap
        scaling = 1.0
    if mask is None:
        scores = scores * scaling
    else:
        scores = torch.add(mask.unsqueeze(1), scores, alpha=scaling)
    if rule.sinks is None:
        weights = scores.softmax(-1, dtype=torch.float32)
    else:
        sinks = rule.sinks.view(1, keys.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    matrices = weights.to(values.dtype).flatten(2, 3).flatten(0, 1)
    return (matrices @ values.flatten(0, 1)).view(*query.shape[:-1], -1)


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Of two batches of matrices; on a GPU not rounded to 16 bits."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left @ right
