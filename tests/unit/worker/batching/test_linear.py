from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from loaderd.server.worker.engine.batching import kernels, linear
from loaderd.server.worker.engine.batching.kernels import Copy, LinearPolicy, best_policy
from loaderd.server.worker.engine.batching.linear import HybridLinear, speed_up
from tests.unit.worker.engine_client import PROMPT, Client, build, reference

_GLU = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
PLENTY = 2**40


def is_there(form: Copy, dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies with such weights."""
    try:
        kernels.CopiedWeight(torch.ones(64, 64, dtype=dtype), None, form)
    except RuntimeError:
        return False
    return True


@pytest.fixture(params=[Copy.REORDERED, Copy.PACKED, Copy.WIDENED])
def always(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LinearPolicy:
    """Trials of tiny layers say little: as if it had paid."""
    if not is_there(request.param, torch.bfloat16):
        pytest.skip("this CPU has no instructions for it")
    policy = LinearPolicy(native_few=True, copy=request.param)
    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
    monkeypatch.setattr(linear, "best_policy", lambda _weights: policy)
    return policy


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
def test_logits_stay_the_same(
    architecture: str,
    sizes: dict[str, Any],
    dtype: torch.dtype,
    tokens: int,
    always: LinearPolicy,
) -> None:
    if not is_there(always.copy, dtype):
        pytest.skip("this CPU has no instructions for it")
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


def test_weights_of_other_types_stay_as_they_are() -> None:
    model = build("llama", **_GLU).to(torch.float64)
    assert speed_up(model, PLENTY) == LinearPolicy()
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_weights_of_32_bits_are_reordered_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", **_GLU)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
        monkeypatch.setattr(linear, "best_policy", lambda _: LinearPolicy(copy=Copy.REORDERED))
        speed_up(model, PLENTY)
        found = model(ids).logits
    assert isinstance(model.get_output_embeddings(), HybridLinear)
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_what_torch_lacks_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing)
    model = build("llama", **_GLU).to(torch.bfloat16)
    assert speed_up(model, PLENTY).copy is Copy.NONE
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_small_models_stay_as_they_are() -> None:
    model = build("llama", **_GLU)
    assert speed_up(model, PLENTY) == LinearPolicy()
    assert type(model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_is_for_the_kernels_of_this_cpu(dtype: torch.dtype) -> None:
    policy = best_policy([torch.randn(96, 64).to(dtype)] * 3)
    assert policy.copy is Copy.NONE or is_there(policy.copy, dtype)
    assert dtype != torch.float32 or policy.copy in {Copy.NONE, Copy.REORDERED}


@pytest.mark.parametrize("form", [Copy.PACKED, Copy.WIDENED])
def test_some_copies_sum_in_32_bits(form: Copy) -> None:
    if not is_there(form, torch.bfloat16):
        pytest.skip("this CPU has no instructions for it")
    weight, bias = torch.randn(96, 64).to(torch.bfloat16), torch.randn(96).to(torch.bfloat16)
    inputs = torch.randn(1, 5, 64).to(torch.bfloat16)
    found = HybridLinear(weight, bias, form)(inputs)
    exact = torch.nn.functional.linear(inputs.double(), weight.double(), bias.double())
    assert found.dtype == torch.bfloat16
    assert (found != exact.to(torch.bfloat16)).float().mean() < 0.02


@pytest.mark.parametrize("scale", [1e6, 1e-7])
def test_weights_that_float16_cannot_hold_are_not_packed(scale: float) -> None:
    weight = (scale * torch.randn(96, 64)).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="float16 cannot hold the weights"):
        kernels.CopiedWeight(weight, None, Copy.PACKED)


def test_a_layer_that_cannot_be_packed_is_computed_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_there(Copy.PACKED, torch.bfloat16):
        pytest.skip("this CPU has no instructions for it")
    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
    monkeypatch.setattr(linear, "best_policy", lambda _: LinearPolicy(copy=Copy.PACKED))
    model = build("llama", **_GLU).to(torch.bfloat16)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
        expected = model(ids).logits
        assert speed_up(model, PLENTY).copy is Copy.PACKED
        assert (model(ids).logits - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (LinearPolicy(), ""),
        (
            LinearPolicy(native_few=True, copy=Copy.REORDERED),
            "linear layers: up to 2 rows as matrix-vector products, "
            "more with weights reordered for oneDNN",
        ),
        (
            LinearPolicy(copy=Copy.PACKED),
            "linear layers: in float32 with weights packed as float16",
        ),
        (
            LinearPolicy(copy=Copy.WIDENED),
            "linear layers: in float32 with widened weights",
        ),
    ],
)
def test_a_policy_is_told_to_operators(policy: LinearPolicy, text: str) -> None:
    assert str(policy) == text


@pytest.mark.parametrize(
    ("form", "dtype", "expected"),
    [
        (Copy.NONE, torch.bfloat16, 0),
        (Copy.REORDERED, torch.bfloat16, 200),
        (Copy.PACKED, torch.bfloat16, 200),
        (Copy.WIDENED, torch.float16, 400),
    ],
)
def test_copies_take_memory(form: Copy, dtype: torch.dtype, expected: int) -> None:
    assert form.bytes_of(torch.zeros(10, 10, dtype=dtype)) == expected
