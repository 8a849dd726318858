"""How large a model is in memory, from its headers and config.json: no tensor is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loaderd.server.errors import SnapshotIncompleteError
from loaderd.server.store.gguf import read_header
from loaderd.server.store.selection import CONFIG, find_weights, is_gguf, is_index, is_pickle
from loaderd.server.store.weights import Tensor, read_shards, read_tensors

# Configurations have one of these names; the text part of a larger one has them one level deeper.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "head_size": ("head_dim",),
    "vocabulary_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
}
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_LARGEST = 2**40  # what is beyond is no size of a model, and must not overflow what is told


@dataclass(frozen=True)
class ModelShape:
    """What a model's files say of its size. None: config.json does not say.

    Attributes:
        numbers: Numbers of all tensors; 0 where only the files' size is known.
        file_bytes: Bytes of the tensors in the files.
        linear_numbers: Numbers of the matrices that linear layers multiply with.
        quantizable_numbers: Of these, all but what gives the logits, which has a row a token.
        quantized: Whether the weights are packed, so that no dtype changes their size.
        sizes: By the keys of `_NAMES`, what config.json says.
        tensors: Each one; empty where the headers are not those of safetensors.
    """

    numbers: int
    file_bytes: int
    linear_numbers: int
    quantizable_numbers: int
    quantized: bool
    sizes: Mapping[str, int | None] = field(default_factory=dict, hash=False)
    tensors: tuple[Tensor, ...] = ()

    @property
    def kv_numbers_per_token(self) -> int | None:
        """Numbers that keys and values of one token have; None if it cannot be told."""
        layers, heads, size = self.sizes.get("layers"), self.sizes.get("heads"), self.head_size
        key_value_heads = self.sizes.get("key_value_heads") or heads
        if layers is None or key_value_heads is None or size is None:
            return None
        return 2 * layers * key_value_heads * size

    @property
    def head_size(self) -> int | None:
        """Numbers of one head."""
        hidden, heads = self.sizes.get("hidden_size"), self.sizes.get("heads")
        return self.sizes.get("head_size") or (hidden // heads if hidden and heads else None)


def read_shape(path: Path, model: str, *, allow_pickle: bool) -> ModelShape:
    """Reads the headers of a model's weights and its config.json.

    Args:
        path: The model's folder, or the GGUF file that it is.
        model: Its name, for errors.
        allow_pickle: Whether its weights may be pickles.

    Raises:
        ModelUnsupportedError: It has no weights that can be loaded.
        SnapshotIncompleteError: A file is missing.
        SnapshotCorruptError: An index or a header is damaged.
    """
    is_file = path.is_file()
    folder = path.parent if is_file else path
    names = {path.name} if is_file else {entry.name for entry in folder.iterdir()}
    listing = find_weights(names, model, allow_pickle=allow_pickle)
    try:
        if is_gguf(listing):  # its sizes are inside, in names that each architecture has its own of
            shapes = read_header(folder / listing, listing, model).shapes
            numbers = sum(map(math.prod, shapes))
            matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
            return ModelShape(numbers, (folder / listing).stat().st_size, matrices, 0, False)
        shards = [listing]
        if is_index(listing):
            shards = sorted(read_shards((folder / listing).read_bytes(), listing, model))
        sizes, quantized = _read_config(folder / CONFIG)
        if is_pickle(listing):  # what they hold is known only to who unpickles them
            size = sum((folder / shard).stat().st_size for shard in shards)
            return ModelShape(0, size, 0, 0, True, sizes)
        tensors = [each for shard in shards for each in read_tensors(folder / shard, shard, model)]
    except FileNotFoundError as error:
        raise SnapshotIncompleteError(model, Path(error.filename).name) from error
    linear = [tensor for tensor in tensors if _is_linear(tensor)]
    return ModelShape(
        numbers=sum(tensor.numbers for tensor in tensors),
        file_bytes=sum(tensor.size_bytes for tensor in tensors),
        linear_numbers=sum(tensor.numbers for tensor in linear),
        quantizable_numbers=sum(
            tensor.numbers for tensor in linear if tensor.shape[0] != sizes["vocabulary_size"]
        ),
        quantized=quantized,
        sizes=sizes,
        tensors=tuple(tensors),
    )


def _is_linear(tensor: Tensor) -> bool:
    """Whether a linear layer multiplies with it; embeddings are matrices that none does."""
    return len(tensor.shape) == 2 and "emb" not in tensor.name and ".wte." not in tensor.name


def _read_config(path: Path) -> tuple[dict[str, int | None], bool]:
    """The sizes that a config.json tells, and whether it says that weights are quantized."""
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        config = None  # whoever loads it says what is wrong with it
    if not isinstance(config, dict):
        config = {}
    candidates = [config, *(config.get(name) for name in _TEXT_PARTS)]
    parts = [part for part in candidates if isinstance(part, dict)]
    return (
        {key: _number(parts, names) for key, names in _NAMES.items()},
        config.get("quantization_config") is not None,
    )


def _number(parts: list[dict[str, Any]], names: tuple[str, ...]) -> int | None:
    for part in parts:
        for name in names:
            value = part.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST:
                return value
    return None
