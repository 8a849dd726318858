"""GGUF files: what is read of them, what is whole, and how a model is named by one."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.errors import (
    InvalidNameError,
    ModelUnsupportedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
)
from loaderd.server.store.gguf import read_header
from loaderd.server.store.names import LocalName
from loaderd.server.store.resolve import LocalFolder, resolve

SHAPES = [(6, 64), (64,), (2, 32)]
Q8 = gguf.GGMLQuantizationType.Q8_0


def write(path: Path, *, tensors: bool = True) -> Path:
    """A small file as llama.cpp's own library writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "\u00e9"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for index, shape in enumerate(SHAPES if tensors else []):
        numbers = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        if index == 0:
            writer.add_tensor("t0", gguf.quantize(numbers, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(f"t{index}", numbers)
    return _close(writer, path)


def _close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def local(path: Path, *roots: Path) -> LocalFolder:
    found = resolve(LocalName(path), cache_dir=path / "none", local_roots=roots or None)
    assert isinstance(found, LocalFolder)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return write(tmp_path / "model" / "model-q8_0.gguf")


def test_what_the_header_says(file: Path) -> None:
    header = read_header(file, file.name, "m")
    assert list(header.shapes) == SHAPES
    assert header.pre_tokenizer == "smollm"
    last = 4 * 64  # of the last tensor, without what the writer adds to reach the alignment
    assert header.end == gguf.GGUFReader(file).tensors[-1].data_offset + last
    assert header.end <= file.stat().st_size < header.end + 32


@pytest.mark.parametrize("kind", list(gguf.GGML_QUANT_SIZES), ids=lambda kind: kind.name)
def test_the_sizes_of_all_types_are_those_of_the_library(tmp_path: Path, kind: int) -> None:
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.zeros((3, 2 * size), dtype=np.uint8), raw_dtype=kind)
    header = read_header(_close(writer, path), path.name, "m")
    assert header.shapes == ((3, 2 * numbers),)
    assert header.end == gguf.GGUFReader(path).tensors[0].data_offset + 3 * 2 * size


def test_a_folder_with_one_file_and_the_file_itself_are_models(file: Path) -> None:
    size = file.stat().st_size
    assert local(file.parent) == LocalFolder(file.parent.resolve(), size)
    assert local(file) == LocalFolder(file.resolve(), size)
    assert local(file, file.parent) == LocalFolder(file.resolve(), size)


def test_of_several_files_one_is_named_by_its_path(file: Path) -> None:
    other = write(file.with_name("model-f16.gguf"))
    with pytest.raises(ModelUnsupportedError, match=r"model-f16\.gguf, model-q8_0\.gguf"):
        local(file.parent)
    assert local(other).path == other.resolve()


def test_a_file_outside_the_roots_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    link = tmp_path / "root" / "model.gguf"
    link.symlink_to(file)
    for path in (file, link):
        with pytest.raises(InvalidNameError, match="outside the folders"):
            local(path, tmp_path / "root")


def test_a_damaged_config_beside_it_is_found(file: Path) -> None:
    (file.parent / "config.json").write_text("[]")
    with pytest.raises(SnapshotCorruptError, match=r"config\.json"):
        local(file)


def test_safetensors_still_need_a_config(file: Path) -> None:
    (file.parent / "model.safetensors").write_bytes(b"")
    with pytest.raises(SnapshotIncompleteError):
        local(file.parent)


@pytest.mark.parametrize("left", [0, 3, 4, 20, 60, 150, -40])
def test_a_cut_file_is_corrupt(file: Path, left: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:left])
    with pytest.raises(SnapshotCorruptError) as caught:
        local(file.parent)
    assert caught.value.file == file.name


def test_without_its_padding_it_is_whole(file: Path) -> None:
    os.truncate(file, read_header(file, file.name, "m").end)
    assert local(file).size_bytes == file.stat().st_size


def test_a_file_without_tensors_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensors=False)
    assert read_header(path, path.name, "m").shapes == ()


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_are_refused_by_name(file: Path, version: int) -> None:
    data = bytearray(file.read_bytes())
    data[4:8] = version.to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(ModelUnsupportedError, match=f"version {version}"):
        local(file)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf")


@given(place=st.integers(0, 400), value=st.integers(0, 255), count=st.integers(1, 8))
def test_whatever_is_in_the_header_ends_in_an_answer(
    scratch: Path, place: int, value: int, count: int
) -> None:
    data = scratch.read_bytes()
    damaged = scratch.with_name("damaged.gguf")
    damaged.write_bytes(data[:place] + bytes([value]) * count + data[place + count :])
    try:
        header = read_header(damaged, damaged.name, "m")
    except (SnapshotCorruptError, ModelUnsupportedError):
        return
    assert header.end <= damaged.stat().st_size
