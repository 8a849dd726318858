"""Models that no memory of the box can hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import psutil
import pytest

from loaderd.client import Client, errors
from tests.daemon import SpawnedDaemon
from tests.unit.store.caches import SMALL_MODEL

NUMBERS = 2**40
"""In two bytes each: two tebibytes of weights."""


def make_huge_model(folder: Path) -> Path:
    """A model whose weights are a hole in a file."""
    folder.mkdir()
    for name, content in SMALL_MODEL.items():
        (folder / name).write_bytes(content)
    tensor = {"dtype": "F16", "shape": [NUMBERS], "data_offsets": [0, 2 * NUMBERS]}
    header = json.dumps({"lm_head.weight": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as weights:
        weights.write(struct.pack("<Q", len(header)) + header)
        weights.truncate(weights.tell() + 2 * NUMBERS)
    return folder


def test_a_model_that_does_not_fit_in_memory_is_refused_before_it_is_read(
    tmp_path: Path, tiny_model: Path
) -> None:
    try:
        folder = make_huge_model(tmp_path / "huge")
    except OSError:
        pytest.skip("this file system has no files of two tebibytes")
    roots = ("--allow-local", str(tmp_path), "--allow-local", str(tiny_model.parent))
    with (
        SpawnedDaemon(tmp_path, ("--standby", "0", *roots)) as daemon,
        Client(daemon.address) as client,
    ):
        small = client.load(tiny_model, device_map="cpu")
        with pytest.raises(errors.DeviceMemoryError) as caught:
            client.load(folder, device_map="cpu")

        assert caught.value.needed_bytes is not None
        assert caught.value.needed_bytes > 2 * NUMBERS
        assert caught.value.free_bytes is not None
        assert caught.value.free_bytes < psutil.virtual_memory().total
        assert caught.value.holders
        assert not client.plan(folder, device_map="cpu").fits
        assert [worker.pid for worker in daemon.workers()] == [
            small.info.details and small.info.details.worker_pid
        ]
        assert small.generate("x", max_new_tokens=1, ignore_eos=True).usage.generated_tokens == 1
