"""Weights quantized at load: what they take, that engines serve them rightly, what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from loaderd.server.box.dtype import DtypeChoice, choose_dtype
from loaderd.server.errors import (
    DeviceMemoryError,
    InvalidArgumentError,
    UnsupportedOptionError,
)
from loaderd.server.worker import devices, quantization
from loaderd.server.worker.engine.batching.linear import HybridLinear
from loaderd.server.worker.engine.batching.trials import identity_of
from loaderd.server.worker.engine.sequential import SequentialEngine
from loaderd.server.worker.facts import model_details
from loaderd.server.worker.loader import ModelLoader
from loaderd.server.worker.quantization import (
    Quantizer,
    choose_quantizer,
    is_quantized,
    quantization_reason,
)
from loaderd.v1.model_pb2 import Dtype, Quantization
from tests.hub.tiny_models import build_tiny_model
from tests.unit.worker.engine_client import Client, reference

INT8, INT4, NF4 = (
    Quantization.QUANTIZATION_INT8,
    Quantization.QUANTIZATION_INT4,
    Quantization.QUANTIZATION_NF4,
)
KINDS = [INT8, INT4, NF4]
LIBRARIES: dict[int, Callable[[], bool]] = {
    INT8: is_torchao_available,
    INT4: is_torchao_available,
    NF4: is_bitsandbytes_available,
}
LINEAR = 3 * 7  # layers of the tiny model, without the one that gives the logits


def quantizer(kind: Any, dtype: torch.dtype = torch.float32) -> Quantizer:
    if not LIBRARIES[kind]():
        pytest.skip("its library is not installed")
    found = choose_quantizer(kind, device_map="cpu", dtype=dtype)
    assert found is not None
    return found


def load(folder: Path, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    chosen = quantizer(kind, dtype)
    loader = ModelLoader(str(folder), dtype=dtype, device_map="cpu", quantizer=chosen)
    return loader.load_model()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_quantized_and_nothing_else(tiny: Path, kind: Any) -> None:
    model = load(tiny, kind)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert [is_quantized(layer.weight) for layer in layers] == [True] * LINEAR + [False]
    assert not is_quantized(model.get_input_embeddings().weight)
    assert not any(is_quantized(norm) for name, norm in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_bytes_are_those_of_what_is_kept(tiny: Path, kind: Any) -> None:
    plain = ModelLoader(str(tiny), dtype=torch.float32, device_map="cpu")
    tokenizer, own = plain.load_tokenizer(), plain.load_model()
    choice = DtypeChoice(Dtype.DTYPE_FLOAT32, "asked for")
    about: Any = (tokenizer, choice, SequentialEngine, "")
    details = model_details(load(tiny, kind), *about)
    before = model_details(own, *about)
    assert details.parameter_count == before.parameter_count
    linear = sum(
        layer.weight.numel()
        for name, layer in own.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    )
    saved = before.weight_bytes - details.weight_bytes
    assert saved == pytest.approx((32 - quantizer(kind).bits) / 8 * linear, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_operators_are_told_what_was_done(tiny: Path, kind: Any) -> None:
    model, chosen = load(tiny, kind), quantizer(kind)
    reason = quantization_reason(model, chosen)
    assert f"{LINEAR} of {LINEAR + 1} linear layers as {chosen.name}, by {chosen.library}" in reason
    plain = ModelLoader(str(tiny), device_map="cpu").load_model()
    assert quantization_reason(plain, None) == ""
    assert "GGUF" in quantization_reason(plain, None, is_gguf=True)
    assert chosen.library in quantization_reason(model, None)  # as files say that have it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["batching", "sequential"])
def test_engines_generate_what_transformers_does(tiny: Path, kind: Any, engine: str) -> None:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    prompts = [[5, 9, 60, 33], [7, 7, 120, 45, 200, 31], [81]]
    model = load(tiny, kind)
    expected = [reference(model, prompt, eos_token_id=None, **options) for prompt in prompts]
    client = Client(model, engine)
    keys = [
        client.start(prompt, return_token_ids=True, ignore_eos=True, **options)
        for prompt in prompts
    ]
    assert [client.wait(key).token_ids for key in keys] == expected
    client.engine.close()


@pytest.mark.parametrize("kind", [INT8, INT4])
def test_only_plain_layers_get_copies(tiny: Path, kind: Any) -> None:
    from loaderd.server.worker.engine.batching import linear
    from loaderd.server.worker.engine.batching.kernels import Form, LinearPolicy

    model = load(tiny, kind, torch.bfloat16)
    ids = torch.tensor([[5, 9, 60, 33]])
    with torch.no_grad():
        expected = model(ids).logits.float()
        linear.speed_up(model, LinearPolicy(Form.WIDENED, Form.WIDENED), 2**40).make_copies()
        found = model(ids).logits.float()
    assert isinstance(model.lm_head, HybridLinear)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert (found - expected).abs().max() < 0.1 * expected.std()


def test_what_was_tried_with_other_weights_says_nothing(tiny: Path) -> None:
    plain = ModelLoader(str(tiny), dtype=torch.float32, device_map="cpu").load_model()
    kinds = [kind for kind in KINDS if LIBRARIES[kind]()]
    identities = {identity_of(plain), *(identity_of(load(tiny, kind)) for kind in kinds)}
    assert len(identities) == 1 + len(kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_where_the_plain_model_does_not_fit(
    tiny: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(tiny, kind)
    needed = sum(map(quantization.count_bytes, loaded.parameters()))
    monkeypatch.setattr(devices, "free_bytes", lambda _: int(1.1 * needed))
    load(tiny, kind)
    with pytest.raises(DeviceMemoryError):
        ModelLoader(str(tiny), dtype=torch.float32, device_map="cpu").load_model()
    monkeypatch.setattr(devices, "free_bytes", lambda _: int(0.8 * needed))
    with pytest.raises(DeviceMemoryError):
        load(tiny, kind)


def test_without_the_option_nothing_is_quantized() -> None:
    none = Quantization.QUANTIZATION_UNSPECIFIED
    assert choose_quantizer(none, device_map="auto", dtype=torch.float16) is None


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"options\.quantization: 99"):
        choose_quantizer(99, device_map="cpu", dtype=torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "library"), [(INT8, "torchao"), (INT4, "torchao"), (NF4, "bitsandbytes")]
)
def test_a_library_that_is_not_installed_is_named(
    kind: Any, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, f"is_{library}_available", lambda: False)
    with pytest.raises(UnsupportedOptionError, match=rf"{library} .*loaderd\[quantization\]"):
        choose_quantizer(kind, device_map="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "device_map", "dtype", "problem"),
    [
        (INT4, "cuda:0", torch.float16, "needs the dtype bfloat16"),
        (INT4, "xpu:0", torch.bfloat16, "no int4 weights on xpu devices"),
        (INT4, "mps", torch.bfloat16, "no int4 weights on mps devices"),
        (NF4, "mps", torch.bfloat16, "not for mps devices"),
    ],
)
def test_what_a_device_cannot_do_is_refused(
    kind: Any, device_map: str, dtype: torch.dtype, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    if kind == INT4 and not is_torchao_available():
        pytest.skip("torchao is not installed")
    with pytest.raises(UnsupportedOptionError, match=problem):
        choose_quantizer(kind, device_map=device_map, dtype=dtype)


def test_code_of_the_hub_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(UnsupportedOptionError, match="code of the hub"):
        choose_quantizer(NF4, device_map="cpu", dtype=torch.float32)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "gpt2", architecture="gpt2")
    with pytest.raises(UnsupportedOptionError, match="no linear layers that torchao"):
        load(folder, INT8)


def test_a_model_that_is_quantized_already_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    with pytest.raises(UnsupportedOptionError, match="already"):
        load(folder, INT8)


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_int4_is_computed_in_bfloat16_unless_asked(on_accelerator: bool) -> None:
    def choose(asked: Any) -> DtypeChoice:
        return choose_dtype(
            asked, on_accelerator=on_accelerator, flags=frozenset(), quantization=INT4
        )

    assert choose(Dtype.DTYPE_UNSPECIFIED).dtype == Dtype.DTYPE_BFLOAT16
    assert "int4" in choose(Dtype.DTYPE_UNSPECIFIED).reason
    assert choose(Dtype.DTYPE_FLOAT32) == DtypeChoice(Dtype.DTYPE_FLOAT32, "asked for")
