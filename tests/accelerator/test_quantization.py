"""Weights in fewer bits on a GPU: what they take, and that the engines serve them rightly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from loaderd.server.errors import UnsupportedOptionError
from loaderd.server.worker.engine.batching.build import EngineSettings
from loaderd.server.worker.facts import TORCH_DTYPES
from loaderd.server.worker.loader import ModelLoader
from loaderd.server.worker.quantization import (
    choose_quantizer,
    count_bytes,
    is_quantized,
    quantization_reason,
)
from loaderd.v1.model_pb2 import Dtype, Quantization
from tests.accelerator.gpu import DEVICE
from tests.accelerator.models import build_model
from tests.unit.worker.engine_client import Client

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "ignore_eos": True,
    "return_token_ids": True,
    "bypass_prefix_cache": True,
    "max_new_tokens": 24,
}
PROMPTS = [[9, 5, 60, 33], [17] * 20, list(range(30, 70)), [200]]
KINDS: dict[str, tuple[Any, Any, Callable[[], bool], float]] = {
    "int8": (
        Quantization.QUANTIZATION_INT8,
        Dtype.DTYPE_FLOAT16,
        is_torchao_available,
        0.6,
    ),
    "int4": (
        Quantization.QUANTIZATION_INT4,
        Dtype.DTYPE_BFLOAT16,
        is_torchao_available,
        0.4,
    ),
    "nf4": (
        Quantization.QUANTIZATION_NF4,
        Dtype.DTYPE_FLOAT16,
        is_bitsandbytes_available,
        0.4,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "wide", layers=3)


def load(folder: Path, name: str) -> tuple[Any, str]:
    kind, dtype, is_available, _ = KINDS[name]
    if not is_available():
        pytest.skip("its library is not installed")
    quantizer = choose_quantizer(kind, device_map=DEVICE, dtype=TORCH_DTYPES[dtype])
    loader = ModelLoader(
        str(folder), dtype=TORCH_DTYPES[dtype], device_map=DEVICE, quantizer=quantizer
    )
    model = loader.load_model()
    return model, quantization_reason(model, quantizer)


@pytest.mark.parametrize("name", KINDS)
def test_linear_layers_have_fewer_bits(folder: Path, name: str) -> None:
    model, reason = load(folder, name)
    assert f"21 of 22 linear layers as {name}" in reason
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    fewer = [layer for layer in layers if is_quantized(layer.weight)]
    plain = sum(2 * layer.in_features * layer.out_features for layer in fewer)
    assert sum(count_bytes(layer.weight) for layer in fewer) < KINDS[name][3] * plain
    assert all(parameter.device == torch.device(DEVICE) for parameter in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_engines_give_the_same(folder: Path, name: str) -> None:
    """Batches, replayed and not, and one by one; the same device computes all of them."""
    sequential = Client(load(folder, name)[0], "sequential")
    expected = [sequential.generate(prompt, **GREEDY).token_ids for prompt in PROMPTS]
    sequential.engine.close()
    for settings in (EngineSettings(), EngineSettings(graphs=False)):
        client = Client(load(folder, name)[0], "batching", settings=settings)
        print(name, client.reason)
        found = [client.generate(prompt, **GREEDY).token_ids for prompt in PROMPTS]
        keys = [client.start(prompt, **GREEDY) for prompt in PROMPTS]
        together = [client.wait(key).token_ids for key in keys]
        client.engine.close()
        # Sixteen bits round, and a token that is as likely as the next may change places with it.
        for one, another in ((found, expected), (together, expected)):
            same = sum(a[:6] == b[:6] for a, b in zip(one, another, strict=True))
            assert same >= len(PROMPTS) - 1


def test_int4_is_for_bfloat16_alone() -> None:
    if not is_torchao_available():
        pytest.skip("its library is not installed")
    with pytest.raises(UnsupportedOptionError, match="bfloat16"):
        choose_quantizer(Quantization.QUANTIZATION_INT4, device_map=DEVICE, dtype=torch.float16)
