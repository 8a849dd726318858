"""Models whose weights are pickles: loaded when allowed, as tensors and nothing else."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loaderd.server.errors import (
    DeviceMemoryError,
    ModelUnsupportedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.worker import devices
from loaderd.server.worker.loader import ModelLoader

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def tensors(tiny_model: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(tiny_model / SAFETENSORS)
    return loaded


@pytest.fixture
def bare(tiny_model: Path, tmp_path: Path) -> Path:
    """The model without its weights."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / SAFETENSORS).unlink()
    return folder


@pytest.fixture
def pickled(bare: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, bare / PICKLE)
    return bare


@pytest.fixture
def sharded(bare: Path, tensors: dict[str, torch.Tensor]) -> Path:
    names = sorted(tensors)
    shards = {"pytorch_model-1-of-2.bin": names[::2], "pytorch_model-2-of-2.bin": names[1::2]}
    for shard, part in shards.items():
        torch.save({name: tensors[name] for name in part}, bare / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (bare / INDEX).write_text(json.dumps(index))
    return bare


def load(folder: Path) -> dict[str, torch.Tensor]:
    loader = ModelLoader(str(folder), dtype=torch.float32, shown_name="org/name", allow_pickle=True)
    state: dict[str, torch.Tensor] = loader.load_model().state_dict()
    return state


def same(state: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(state[name].cpu(), tensor) for name, tensor in tensors.items())


def test_one_file(pickled: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert same(load(pickled), tensors)


def test_shards(sharded: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert same(load(sharded), tensors)


def test_the_form_that_old_repositories_have(bare: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, bare / PICKLE, _use_new_zipfile_serialization=False)
    assert same(load(bare), tensors)


@pytest.mark.parametrize("form", ["pickled", "sharded"])
def test_without_leave_they_are_refused_with_the_way_to_allow_them(
    form: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(form)
    with pytest.raises(ModelUnsupportedError) as refused:
        ModelLoader(str(folder), shown_name="org/name").load_model()
    assert "--allow-pickle org/name" in refused.value.problem


def test_safetensors_win(pickled: Path, tiny_model: Path, tensors: dict[str, torch.Tensor]) -> None:
    shutil.copy(tiny_model / SAFETENSORS, pickled)
    (pickled / PICKLE).write_bytes(b"never read")
    assert same(load(pickled), tensors)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._mark),)


def _in_a_tensors_place(weights: dict[str, Any], evil: Malicious, path: Path) -> None:
    torch.save(weights | {"model.norm.weight": evil}, path)


def _beside_the_tensors(weights: dict[str, Any], evil: Malicious, path: Path) -> None:
    torch.save(weights | {"extra": evil}, path)


def _in_the_old_form(weights: dict[str, Any], evil: Malicious, path: Path) -> None:
    torch.save(weights | {"extra": evil}, path, _use_new_zipfile_serialization=False)


def _alone(_: dict[str, Any], evil: Malicious, path: Path) -> None:
    path.write_bytes(pickle.dumps(evil, protocol=2))


@pytest.mark.parametrize(
    "write", [_in_a_tensors_place, _beside_the_tensors, _in_the_old_form, _alone]
)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_malicious_pickle_runs_nothing(
    pickled: Path,
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    write: Callable[[dict[str, Any], Malicious, Path], None],
    quantized: bool,
) -> None:
    mark = tmp_path / "ran"
    write(tensors, Malicious(mark), pickled / PICKLE)
    if quantized:
        config = json.loads((pickled / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8"}
        (pickled / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnsupportedError) as refused:
        load(pickled)
    assert PICKLE in refused.value.problem
    assert not mark.exists()


def test_a_malicious_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    shard = "pytorch_model-2-of-2.bin"
    (sharded / shard).write_bytes(pickle.dumps(Malicious(tmp_path / "ran"), protocol=2))
    with pytest.raises(ModelUnsupportedError, match=shard):
        load(sharded)
    assert not (tmp_path / "ran").exists()


def test_a_config_cannot_lead_to_a_pickle(
    pickled: Path, tiny_model: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    shutil.copy(tiny_model / SAFETENSORS, pickled)
    (pickled / "adapter_model.bin").write_bytes(
        pickle.dumps(Malicious(tmp_path / "ran"), protocol=2)
    )
    config = json.loads((pickled / "config.json").read_text())
    config["transformers_weights"] = "adapter_model.bin"
    (pickled / "config.json").write_text(json.dumps(config))
    assert same(load(pickled), tensors)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, torch.zeros(2)])
def test_what_is_no_table_of_tensors_is_refused(bare: Path, content: Any) -> None:
    torch.save(content, bare / PICKLE)
    with pytest.raises(ModelUnsupportedError, match="something else than tensors"):
        load(bare)


def test_damaged_files_are_named(pickled: Path) -> None:
    whole = (pickled / PICKLE).read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-30]):
        (pickled / PICKLE).write_bytes(content)
        with pytest.raises(SnapshotCorruptError) as caught:
            load(pickled)
        assert caught.value.file == PICKLE


def test_a_missing_tensor_and_a_missing_shard_are_named(
    sharded: Path, tensors: dict[str, torch.Tensor]
) -> None:
    shard = "pytorch_model-2-of-2.bin"
    part = torch.load(sharded / shard, weights_only=True)
    gone = sorted(part)[0]
    torch.save({name: tensor for name, tensor in part.items() if name != gone}, sharded / shard)
    with pytest.raises(SnapshotCorruptError) as corrupt:
        load(sharded)
    assert gone in corrupt.value.expected
    (sharded / shard).unlink()
    with pytest.raises(SnapshotIncompleteError) as incomplete:
        load(sharded)
    assert incomplete.value.file == shard


def test_what_does_not_fit_is_refused_before_it_is_read(
    pickled: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * sum(tensor.numel() for tensor in tensors.values())
    monkeypatch.setattr(devices, "free_bytes", lambda _: needed - 1)
    with pytest.raises(DeviceMemoryError):
        load(pickled)
    monkeypatch.setattr(devices, "free_bytes", lambda _: needed)
    load(pickled)
