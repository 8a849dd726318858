from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from loaderd.server.worker.engine.batching import linear
from loaderd.server.worker.engine.batching.linear import HybridLinear, LinearPolicy, speed_up
from tests.unit.worker.engine_client import PROMPT, Client, build, reference

_GLU = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
BOTH = LinearPolicy(native_few=True, reordered=True)
PLENTY = 2**40


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of tiny layers say little: as if both had paid."""
    monkeypatch.setattr(linear, "_try", lambda _weights: BOTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("llama", _GLU),
        ("llama", {**_GLU, "tie_word_embeddings": True}),
        ("qwen2", _GLU),
        ("gpt2", {}),
        ("opt", {}),
        ("gpt_neox", {"intermediate_size": 64, "num_attention_heads": 4}),
    ],
)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
@pytest.mark.usefixtures("always")
def test_logits_stay_the_same(
    architecture: str, sizes: dict[str, Any], dtype: torch.dtype, tokens: int
) -> None:
    model = build(architecture, **sizes).to(dtype)
    weights = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.tensor([PROMPT[:tokens]])
    with torch.no_grad():
        expected = model(ids).logits.float()
        policy = speed_up(model, PLENTY)
        with policy.step(tokens):
            found = model(ids).logits.float()
    assert isinstance(model.get_output_embeddings(), HybridLinear)
    assert (found - expected).abs().max() < 0.1 * expected.std()
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.usefixtures("always")
def test_an_engine_generates_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", **_GLU).to(torch.bfloat16)
    # A model of 16 bits has ties that rounding decides; these weights have few.
    expected = reference(
        copy.deepcopy(model), do_sample=False, max_new_tokens=10, eos_token_id=None
    )
    client = Client(model, "batching")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "ignore_eos": True}
    keys = [client.start(return_token_ids=True, **options) for _ in range(6)]
    assert [client.wait(key).token_ids for key in keys] == [expected] * 6
    client.engine.close()


@pytest.mark.usefixtures("always")
def test_without_memory_for_a_copy_the_weights_stay_as_they_are() -> None:
    model = build("llama", **_GLU).to(torch.bfloat16)
    policy = speed_up(model, 1000)
    assert policy == LinearPolicy(native_few=True)
    assert type(model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.usefixtures("always")
def test_models_of_32_bits_stay_as_they_are() -> None:
    model = build("llama", **_GLU)
    assert speed_up(model, PLENTY) == LinearPolicy()
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_what_torch_lacks_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(linear, "_reordered", missing)
    model = build("llama", **_GLU).to(torch.bfloat16)
    assert speed_up(model, PLENTY) == LinearPolicy()
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_the_trial_is_for_the_kernels_of_this_cpu() -> None:
    weight = torch.randn(96, 64).to(torch.bfloat16)
    with torch.inference_mode():
        assert isinstance(linear._try([weight] * 3), LinearPolicy)
    assert str(BOTH) == (
        "linear layers: up to 2 rows as matrix-vector products, "
        "more with weights reordered for oneDNN"
    )
    assert str(LinearPolicy()) == ""
