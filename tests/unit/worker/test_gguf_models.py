"""Models from GGUF files, through transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loaderd.server.errors import (
    DeviceMemoryError,
    ModelUnsupportedError,
    SnapshotCorruptError,
    UnsupportedOptionError,
)
from loaderd.server.worker import devices, pretrained
from loaderd.server.worker.loader import ModelLoader
from loaderd.server.worker.quantization import Quantizer
from loaderd.v1.model_pb2 import Quantization
from tests.hub import Hub, HubRepo
from tests.hub.tiny_gguf import write_tiny_gguf
from tests.hub.tiny_models import build_tiny_model

TEXT = "The sky is blue, 123\n\tand <|im_end|> ends it."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def file(plain: Path) -> Path:
    (plain.parent / "gguf").mkdir()
    return write_tiny_gguf(plain, plain.parent / "gguf" / "tiny-q8_0.gguf")


@pytest.mark.parametrize("by_folder", [True, False])
def test_it_is_the_model_that_it_was_made_of(plain: Path, file: Path, by_folder: bool) -> None:
    asked: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    loader = ModelLoader(str(file.parent if by_folder else file), **asked)
    found, expected = loader.load_model(), ModelLoader(str(plain), **asked).load_model()
    assert loader.is_gguf
    assert found.dtype == torch.float32
    for name, weight in expected.named_parameters():
        error = (found.get_parameter(name) - weight).abs().max()
        assert error <= weight.abs().max() / 127, name  # of 8 bits
    assert found.generation_config.eos_token_id == expected.generation_config.eos_token_id
    ids = torch.tensor([[5, 9, 60, 33]])
    logits, reference = found(ids).logits, expected(ids).logits
    assert (logits - reference).std() < 0.05 * reference.std()


def test_its_tokenizer_is_in_it(plain: Path, file: Path) -> None:
    found = ModelLoader(str(file)).load_tokenizer()
    expected = ModelLoader(str(plain)).load_tokenizer()
    token_ids = found(TEXT)["input_ids"]
    assert token_ids == expected(TEXT)["input_ids"]
    assert found.decode(token_ids) == TEXT
    assert found.pad_token == expected.eos_token
    assert found.chat_template == expected.chat_template


def test_a_tokenizer_beside_it_wins(plain: Path, file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / name, tmp_path)
    tokenizer = ModelLoader(str(tmp_path)).load_tokenizer()
    assert tokenizer.model_max_length == 256  # which only the folder's says


def test_what_it_takes_is_that_of_unpacked_weights(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * ModelLoader(str(file)).load_model().num_parameters()
    assert needed > 3 * file.stat().st_size
    monkeypatch.setattr(devices, "free_bytes", lambda _: needed - 1)
    with pytest.raises(DeviceMemoryError):
        ModelLoader(str(file), dtype=torch.float32).load_model()
    monkeypatch.setattr(devices, "free_bytes", lambda _: needed)
    ModelLoader(str(file), dtype=torch.float32).load_model()


def test_it_is_not_quantized_again(file: Path) -> None:
    quantizer = Quantizer(Quantization.QUANTIZATION_INT8, "torchao", None, bits=8)
    with pytest.raises(UnsupportedOptionError, match=r"options\.quantization.*already"):
        ModelLoader(str(file), quantizer=quantizer).load_model()


def test_a_cut_file_is_corrupt(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(SnapshotCorruptError, match=r"cut\.gguf"):
        ModelLoader(str(cut)).load_model()


def test_a_tensor_that_is_missing_is_not_made_up(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(SnapshotCorruptError, match="up_proj"):
        ModelLoader(str(damaged)).load_model()


@pytest.mark.parametrize("name", [b"llama", b"feed_forward_length", b"attention.head_count"])
def test_what_transformers_cannot_read_is_refused(file: Path, tmp_path: Path, name: bytes) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes().replace(name, name[::-1]))
    with pytest.raises((ModelUnsupportedError, SnapshotCorruptError)):
        ModelLoader(str(other)).load_model()


def test_without_the_library_it_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "is_gguf_available", lambda: False)
    with pytest.raises(ModelUnsupportedError, match=r"loaderd\[quantization\]"):
        ModelLoader(str(file)).load_model()


DOWNLOAD = """
from loaderd.server.worker.loader import ModelLoader

loader = ModelLoader("org/gguf")
assert loader.load_model().config.vocab_size == 320
assert loader.load_tokenizer().eos_token == "<|im_end|>"
assert loader.is_gguf
"""


def test_a_repository_that_has_only_one_is_downloaded(file: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub library reads its environment at import."""
    repo = HubRepo("org/gguf")
    repo.commit({file.name: file, "README.md": b"no config.json"})
    with Hub(repo) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        subprocess.run([sys.executable, "-c", DOWNLOAD], env=environment, check=True, timeout=120)
