"""Weight files and their index, whatever bytes they hold."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from loaderd.server.errors import SnapshotCorruptError
from loaderd.server.store.weights import check_weights, read_shards
from tests.unit.store.caches import safetensors

numpy = pytest.importorskip("numpy")

INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def check(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "blob")
        path.write_bytes(content)
        check_weights(path, "model.safetensors", "org/model")


def test_what_the_safetensors_library_writes_is_right_and_any_other_length_is_not() -> None:
    content = save(
        {"a": numpy.zeros((3, 5), "float32"), "b": numpy.ones(7, "int8")}, {"format": "pt"}
    )
    check(content)
    check(save({}))
    for other in (content[:-1], content + b"\0", content[:4], content[:100], b""):
        with pytest.raises(SnapshotCorruptError) as caught:
            check(other)
        assert caught.value.file == "model.safetensors"


def _header(header: object) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner),
    max_leaves=6,
)
TENSORS = st.dictionaries(
    st.text(max_size=5), st.fixed_dictionaries({"data_offsets": JSON | st.lists(st.integers())})
)


@given(st.one_of(st.binary(max_size=200), JSON.map(_header), TENSORS.map(_header)))
def test_any_other_content_is_corrupt_and_nothing_worse(content: bytes) -> None:
    try:
        check(content)
    except SnapshotCorruptError:
        return
    # The only way to be right: a header, and as many bytes behind it as it says.
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    ends = [int(t["data_offsets"][1]) for n, t in header.items() if n != "__metadata__"]
    assert len(content) == 8 + length + max(ends, default=0)


def test_a_header_that_claims_to_be_huge_is_not_read() -> None:
    with pytest.raises(SnapshotCorruptError):
        check(struct.pack("<Q", 1 << 62) + safetensors())


def test_an_index_names_its_shards() -> None:
    data = json.dumps({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
    assert read_shards(data.encode(), INDEX, "org/model") == {"x.safetensors", "y.safetensors"}


@given(st.one_of(st.binary(), JSON.map(json.dumps).map(str.encode)))
def test_any_other_index_is_corrupt_and_nothing_worse(data: bytes) -> None:
    with pytest.raises(SnapshotCorruptError):
        read_shards(data, INDEX, "org/model")


@given(st.text())
def test_shards_are_plain_file_names(name: str) -> None:
    data = json.dumps({"weight_map": {"a": name}}).encode()
    try:
        shards = read_shards(data, INDEX, "org/model")
    except SnapshotCorruptError:
        return
    assert shards == {name}
    assert Path("/folder", name).parent == Path("/folder")
    assert name.endswith(".safetensors")


def test_an_index_names_shards_of_its_own_format_only() -> None:
    pickles = json.dumps({"weight_map": {"a": "x.bin", "b": "y.bin"}}).encode()
    assert read_shards(pickles, PICKLE_INDEX, "org/model") == {"x.bin", "y.bin"}
    safetensors_files = json.dumps({"weight_map": {"a": "x.safetensors"}}).encode()
    for data, index in ((pickles, INDEX), (safetensors_files, PICKLE_INDEX)):
        with pytest.raises(SnapshotCorruptError) as caught:
            read_shards(data, index, "org/model")
        assert caught.value.file == index
    outside = json.dumps({"weight_map": {"a": "../other/x.bin"}}).encode()
    with pytest.raises(SnapshotCorruptError):
        read_shards(outside, PICKLE_INDEX, "org/model")


def test_offsets_beyond_all_numbers_are_damage() -> None:
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e400]}}'
    with pytest.raises(SnapshotCorruptError):
        check(struct.pack("<Q", len(header)) + header)


def test_a_shard_whose_name_no_file_system_takes_is_damage() -> None:
    index = json.dumps({"weight_map": {"a": "x" * 400 + ".safetensors"}})
    with pytest.raises(SnapshotCorruptError):
        read_shards(index.encode(), INDEX, "org/model")
