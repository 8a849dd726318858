"""A model's size, from headers and config.json alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loaderd.server.errors import SnapshotIncompleteError
from loaderd.server.models.needs import estimate
from loaderd.server.store.shape import read_shape

CONFIG = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
}
KV_NUMBERS = 2 * 3 * 2 * 8  # keys and values, layers, heads, numbers of a head


def write(folder: Path, config: Any = None, **tensors: tuple[int, ...]) -> Path:
    tensors = tensors or {"model.embed_tokens.weight": (100, 64), "q_proj.weight": (64, 64)}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def test_numbers_of_all_tensors_and_of_those_that_layers_multiply_with(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path), "org/name", allow_pickle=False)
    assert shape.numbers == 100 * 64 + 64 * 64
    assert shape.file_bytes == 4 * shape.numbers
    assert shape.linear_numbers == 64 * 64
    assert shape.kv_numbers_per_token == KV_NUMBERS
    assert not shape.quantized


def test_the_dtype_decides_what_weights_and_keys_take(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path), "org/name", allow_pickle=False)
    half, whole = (estimate(shape, size, on_accelerator=False) for size in (2, 4))
    assert (half.needs.weights, whole.needs.weights) == (2 * shape.numbers, 4 * shape.numbers)
    assert half.needs.kv_cache == 2048 * KV_NUMBERS * 2
    assert half.kv_tokens == 2048
    assert half.unknown == ()
    assert half.needs.copies == 2 * 64 * 64
    assert estimate(shape, 2, on_accelerator=True).needs.copies == 0


def test_packed_weights_have_the_size_of_their_files(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"bits": 4}}
    shape = read_shape(write(tmp_path, config), "org/name", allow_pickle=False)
    assert estimate(shape, 2, on_accelerator=True).needs.weights == shape.file_bytes


def test_shards_are_added_up(tmp_path: Path) -> None:
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({shard: np.zeros((3, 5), np.float16)}, tmp_path / shard)
    weight_map = {name: name for name in ("a.safetensors", "b.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    assert read_shape(tmp_path, "org/name", allow_pickle=False).numbers == 30
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(SnapshotIncompleteError, match=r"b\.safetensors"):
        read_shape(tmp_path, "org/name", allow_pickle=False)


def test_the_text_part_of_a_larger_model_is_found(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, {"text_config": CONFIG}), "org/name", allow_pickle=False)
    assert shape.kv_numbers_per_token == KV_NUMBERS


@pytest.mark.parametrize(
    "config", [{}, [], {"num_hidden_layers": "three"}, {"num_hidden_layers": True}, 7]
)
def test_what_the_config_does_not_tell_is_said_not_guessed(tmp_path: Path, config: Any) -> None:
    shape = read_shape(write(tmp_path, config), "org/name", allow_pickle=False)
    found = estimate(shape, 2, on_accelerator=False)
    assert (found.needs.kv_cache, found.needs.activations, found.kv_tokens) == (0, 0, 0)
    assert [text.partition(":")[0] for text in found.unknown] == ["keys and values", "activations"]


def test_pickles_have_the_size_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 77)
    (tmp_path / "config.json").write_text("{}")
    shape = read_shape(tmp_path, "org/name", allow_pickle=True)
    assert estimate(shape, 2, on_accelerator=False).needs.weights == 77
