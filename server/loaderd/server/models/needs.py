"""What loading a model will take, estimated from the shape that its files tell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loaderd.server.models.placement import Needs
from loaderd.server.store.shape import ModelShape
from loaderd.server.store.weights import Tensor

_LEAST_TOKENS = 4096
"""One sequence of so many tokens, or of the model's context, is the least that is of use."""
_STEP_TOKENS, _ACCELERATOR_STEP_TOKENS = 512, 2048
"""Of prompts, computed in one step."""
_STEP_ROWS = 64
"""That a step chooses tokens for, each with the logits of the whole vocabulary."""
_WIDEST = 4
"""Bytes of a number in which layers compute where that is faster."""
_MARGIN = 0.05
"""Of the weights, for what allocators leave unused."""
_CONTEXT_BYTES = 768 << 20
"""What the driver of an accelerator and its libraries take for a process."""
_PROCESS_BYTES = 64 << 20
"""What loading adds to a process on the CPU besides: configuration, tokenizer, engine."""
_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")
"""The first part of a weight's name that counts names its layer."""


@dataclass(frozen=True)
class Estimate:
    """What a model needs.

    Attributes:
        needs: In bytes.
        kv_tokens: For how many tokens the keys and values are counted.
        unknown: What config.json does not say, and is not counted therefore.
    """

    needs: Needs
    kv_tokens: int
    unknown: tuple[str, ...]


def estimate(
    shape: ModelShape,
    itemsize: int,
    *,
    on_accelerator: bool,
    bits: float | None = None,
    modules: Mapping[str, str] | None = None,
) -> Estimate:
    """Estimates what a model takes.

    Args:
        shape: What its files tell.
        itemsize: Bytes of a number in the dtype that it is loaded in.
        on_accelerator: Whether it goes to accelerators, else to the CPU.
        bits: Of a number of linear layers that are quantized at the load; None: they are not.
        modules: The device of each module, where the request says it.
    """
    weights = shape.file_bytes if shape.quantized else shape.numbers * itemsize
    if bits is not None and not shape.quantized:
        weights -= math.floor(shape.quantizable_numbers * (itemsize - bits / 8))
    is_packed = shape.quantized or bits is not None
    tokens = min(shape.sizes.get("context_length") or _LEAST_TOKENS, _LEAST_TOKENS)
    kv_numbers = shape.kv_numbers_per_token
    activations = _activations(shape, _ACCELERATOR_STEP_TOKENS if on_accelerator else _STEP_TOKENS)
    unknown = []
    if kv_numbers is None:
        unknown.append("keys and values: config.json does not tell layers, heads and their size")
    if activations is None:
        unknown.append("activations: config.json does not tell hidden size and vocabulary")
    if not shape.tensors:
        unknown.append("layers: only whoever reads the files knows how large each one is")
    needs = Needs(
        weights=weights,
        kv_cache=tokens * (kv_numbers or 0) * itemsize,
        activations=activations or 0,
        headroom=_CONTEXT_BYTES if on_accelerator else _PROCESS_BYTES,
        copies=0 if on_accelerator or is_packed else shape.linear_numbers * itemsize,
        margin=int(weights * _MARGIN),
        largest=_largest(shape, itemsize),
        placed=_placed(shape, itemsize, weights, modules or {}),
    )
    return Estimate(needs, tokens if kv_numbers else 0, tuple(unknown))


def _activations(shape: ModelShape, tokens: int) -> int | None:
    hidden, vocabulary = shape.sizes.get("hidden_size"), shape.sizes.get("vocabulary_size")
    if hidden is None or vocabulary is None:
        return None
    inner = shape.sizes.get("intermediate_size") or 4 * hidden
    return _WIDEST * (tokens * (4 * hidden + 2 * inner) + _STEP_ROWS * vocabulary)


def _largest(shape: ModelShape, itemsize: int) -> int:
    """Bytes of the largest layer, or of what is in none, such as embeddings."""
    sizes: dict[str, int] = {}
    for tensor in shape.tensors:
        layer = _LAYER.match(tensor.name)
        part = layer[0] if layer else tensor.name.rpartition(".")[0]
        sizes[part] = sizes.get(part, 0) + _bytes(tensor, shape, itemsize)
    return max(sizes.values(), default=0)


def _placed(
    shape: ModelShape, itemsize: int, weights: int, modules: Mapping[str, str]
) -> dict[str, int]:
    """The weights of each device; those whose names the map does not have count on each."""
    # Files may name weights without the first part of their modules' names, as those of a model
    # without its head do.
    names = {module.partition(".")[2]: module for module in modules if "." in module}
    names |= {module: module for module in modules}
    placed = dict.fromkeys(modules.values(), 0)
    known = 0
    for tensor in shape.tensors:
        holders = _holders(tensor.name)
        found = next((names[name] for name in holders if name in names), None)
        if found is not None:
            count = _bytes(tensor, shape, itemsize)
            placed[modules[found]] += count
            known += count
    return {device: count + max(weights - known, 0) for device, count in placed.items()}


def _holders(tensor: str) -> Iterator[str]:
    """A tensor's name and those of the modules that it is in, the innermost first."""
    yield tensor
    while "." in tensor:
        tensor = tensor.rpartition(".")[0]
        yield tensor
    yield ""


def _bytes(tensor: Tensor, shape: ModelShape, itemsize: int) -> int:
    return tensor.size_bytes if shape.quantized else tensor.numbers * itemsize
