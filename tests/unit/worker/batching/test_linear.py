from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loaderd.server.worker.engine.batching import kernels, linear, preparation
from loaderd.server.worker.engine.batching.kernels import FEW, Form, LinearPolicy, best_policy
from loaderd.server.worker.engine.batching.linear import (
    HybridLinear,
    fastest,
    product_of,
    speed_up,
)
from loaderd.server.worker.engine.batching.mapped import is_mapped
from loaderd.server.worker.loader import ModelLoader
from tests.unit.worker.engine_client import PROMPT, Client, build, reference

_GLU = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
PLENTY = 2**40


def is_there(form: Form, dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies with such weights."""
    try:
        kernels.product(torch.ones(64, 64, dtype=dtype), None, form)
    except RuntimeError:
        return False
    return True


COPIES = (Form.REORDERED, Form.PACKED, Form.WIDENED)
POLICIES = [
    *(LinearPolicy(Form.NATIVE, form) for form in (Form.OWN, *COPIES)),
    *(LinearPolicy(form, form) for form in COPIES),
    LinearPolicy(Form.PACKED, Form.REORDERED),
    LinearPolicy(Form.REORDERED, Form.PACKED),
]


@pytest.fixture(params=POLICIES, ids=lambda policy: f"{policy.few.value}-{policy.many.value}")
def policy(request: pytest.FixtureRequest) -> LinearPolicy:
    """As if it had paid: trials of tiny layers say little."""
    found: LinearPolicy = request.param
    if not all(is_there(form, torch.bfloat16) for form in (found.few, found.many)):
        pytest.skip("this CPU has no instructions for it")
    return found


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
    policy: LinearPolicy,
) -> None:
    if not all(is_there(form, dtype) for form in (policy.few, policy.many)):
        pytest.skip("this CPU has no instructions for it")
    model = build(architecture, **sizes).to(dtype)
    weights = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.tensor([PROMPT[:tokens]])
    with torch.no_grad():
        expected = model(ids).logits.float()
        linears = speed_up(model, policy, PLENTY)
        before = model(ids).logits.float()
        linears.make_copies()
        found = model(ids).logits.float()
    assert linears.policy == policy
    assert (before - expected).abs().max() < 0.1 * expected.std()
    assert isinstance(model.get_output_embeddings(), HybridLinear)
    assert (found - expected).abs().max() < 0.1 * expected.std()
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    assert torch._C._get_mkldnn_enabled()


def test_an_engine_generates_with_them(
    policy: LinearPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "fastest", lambda _model: policy)
    model = build("llama", **_GLU).to(torch.bfloat16)
    # A model of 16 bits has ties that rounding decides; these weights have few.
    expected = reference(
        copy.deepcopy(model), do_sample=False, max_new_tokens=10, eos_token_id=None
    )
    client = Client(model, "batching")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "ignore_eos": True}
    keys = [client.start(return_token_ids=True, **options) for _ in range(6)]
    assert [client.wait(key).token_ids for key in keys] == [expected] * 6
    assert str(policy) in client.reason
    client.engine.close()


def test_without_memory_there_are_no_copies(policy: LinearPolicy) -> None:
    model = build("llama", **_GLU).to(torch.bfloat16)
    linears = speed_up(model, policy, 1000)
    assert linears.missing_bytes == linears.policy.bytes_of(2) == 0


def test_with_memory_for_one_copy_there_are_not_two() -> None:
    model = build("llama", **_GLU).to(torch.bfloat16)
    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    room = 2 * sum(layer.weight.numel() for layer in linears)
    found = speed_up(model, LinearPolicy(Form.PACKED, Form.REORDERED), room)
    assert found.missing_bytes <= room


def test_weights_that_only_copies_multiply_are_held_once() -> None:
    if not is_there(Form.PACKED, torch.bfloat16):
        pytest.skip("this CPU has no instructions for it")
    model = build("llama", **_GLU).to(torch.bfloat16)
    layer = model.model.layers[0].self_attn
    before = layer.q_proj.weight.data_ptr()
    speed_up(model, LinearPolicy(Form.PACKED, Form.PACKED), PLENTY)
    assert layer.q_proj.weight.data_ptr() == before


def storages(layers: Sequence[Any]) -> set[int]:
    return {layer.weight.untyped_storage().data_ptr() for layer in layers}


def test_weights_that_are_multiplied_themselves_become_one_with_the_copies() -> None:
    model = build("llama", **_GLU).to(torch.bfloat16)
    policy = LinearPolicy(Form.NATIVE, Form.REORDERED)
    if not is_there(Form.REORDERED, torch.bfloat16):
        pytest.skip("this CPU has no instructions for it")
    attention = model.model.layers[0].self_attn
    before = [layer.weight.clone() for layer in (attention.q_proj, attention.k_proj)]
    linears = speed_up(model, policy, PLENTY)
    assert len(storages([attention.q_proj, attention.k_proj, attention.v_proj])) == 3
    linears.make_copies()
    assert len(storages([attention.q_proj, attention.k_proj, attention.v_proj])) == 1
    assert torch.equal(attention.q_proj.weight, before[0])
    assert torch.equal(attention.k_proj.weight, before[1])


def test_what_becomes_one_takes_memory_where_it_was_in_a_file(tmp_path: Path) -> None:
    model = build("llama", **_GLU).to(torch.bfloat16)
    policy = LinearPolicy(Form.NATIVE, Form.REORDERED)
    if not is_there(Form.REORDERED, torch.bfloat16):
        pytest.skip("this CPU has no instructions for it")
    model.save_pretrained(tmp_path)
    mapped = ModelLoader(str(tmp_path), dtype=torch.bfloat16, device_map="cpu").load_model()
    layers = [layer for layer in mapped.modules() if isinstance(layer, torch.nn.Linear)]
    numbers = sum(layer.weight.numel() for layer in layers)
    alone = sum(
        layer.weight.numel()
        for block in mapped.model.layers
        for layer in (block.self_attn.o_proj, block.mlp.down_proj)
    )
    alone += mapped.lm_head.weight.numel()
    assert is_mapped(mapped.lm_head.weight)
    assert not is_mapped(model.lm_head.weight)
    assert speed_up(model, policy, PLENTY).missing_bytes == 2 * numbers
    assert speed_up(mapped, policy, PLENTY).missing_bytes == 2 * (2 * numbers - alone)


def test_the_memory_of_copies_is_told_before_it_is_taken() -> None:
    if not is_there(Form.PACKED, torch.bfloat16):
        pytest.skip("this CPU has no instructions for it")
    model = build("llama", **_GLU).to(torch.bfloat16)
    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    numbers = sum(layer.weight.numel() for layer in linears)
    found = speed_up(model, LinearPolicy(Form.PACKED, Form.PACKED), PLENTY)
    assert found.missing_bytes == 2 * numbers
    found.make_copies()
    assert found.missing_bytes == 0


def test_weights_of_other_types_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
    model = build("llama", **_GLU).to(torch.float64)
    assert fastest(model) == LinearPolicy()
    speed_up(model, LinearPolicy(), PLENTY)
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_weights_of_32_bits_can_be_reordered() -> None:
    model = build("llama", **_GLU)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(ids).logits
        speed_up(model, LinearPolicy(Form.REORDERED, Form.REORDERED), PLENTY).make_copies()
        found = model(ids).logits
    assert isinstance(model.get_output_embeddings(), HybridLinear)
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_what_torch_lacks_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing)
    monkeypatch.setattr(torch.ops.quantized, "linear_prepack_fp16", missing)
    found = fastest(build("llama", **_GLU).to(torch.bfloat16))
    assert found.bytes_of(2) == 0


def test_inputs_of_whole_numbers_are_left_to_their_layer() -> None:
    class Scaled(nn.Linear):  # type: ignore[misc]
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs @ self.weight.to(inputs.dtype).t() / 100

    layer = Scaled(4, 2, bias=False)
    layer.weight = nn.Parameter(torch.full((2, 4), 50, dtype=torch.int8), requires_grad=False)
    assert product_of(layer)(torch.full((1, 4), 0.5)).tolist() == [[1.0, 1.0]]


def test_small_models_stay_as_they_are() -> None:
    model = build("llama", **_GLU)
    assert fastest(model) == LinearPolicy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_is_for_the_kernels_of_this_cpu(dtype: torch.dtype) -> None:
    found = best_policy([torch.randn(96, 64).to(dtype)] * 3)
    for form in (found.few, found.many):
        assert is_there(form, dtype)
        assert dtype != torch.float32 or form in {Form.OWN, Form.NATIVE, Form.REORDERED}


@pytest.mark.parametrize("room", [0, 1, 2, 4, 6])
def test_copies_take_no_more_than_there_is(room: int) -> None:
    weights = [torch.randn(96, 64).bfloat16()] * 3
    assert best_policy(weights, room).bytes_of(2) <= room


@pytest.mark.parametrize("form", [Form.PACKED, Form.WIDENED])
@pytest.mark.parametrize("rows", [1, FEW + 1])
def test_some_copies_sum_in_32_bits(form: Form, rows: int) -> None:
    if not is_there(form, torch.bfloat16):
        pytest.skip("this CPU has no instructions for it")
    weight, bias = torch.randn(96, 64).to(torch.bfloat16), torch.randn(96).to(torch.bfloat16)
    inputs = torch.randn(1, rows, 64).to(torch.bfloat16)
    linear = HybridLinear(weight, bias, LinearPolicy(form, form))
    linear.hybrid.make_copies()
    found = linear(inputs)
    exact = torch.nn.functional.linear(inputs.double(), weight.double(), bias.double())
    assert found.dtype == torch.bfloat16
    assert (found != exact.to(torch.bfloat16)).float().mean() < 0.02


@pytest.mark.parametrize("scale", [1e6, 1e-7])
def test_weights_that_float16_cannot_hold_are_not_packed(scale: float) -> None:
    weight = (scale * torch.randn(96, 64)).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="float16 cannot hold the weights"):
        kernels.product(weight, None, Form.PACKED)


def test_a_layer_that_cannot_be_packed_is_computed_without() -> None:
    if not is_there(Form.PACKED, torch.bfloat16):
        pytest.skip("this CPU has no instructions for it")
    model = build("llama", **_GLU).to(torch.bfloat16)
    ids = torch.tensor([PROMPT])
    packed = LinearPolicy(Form.PACKED, Form.PACKED)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
        expected = model(ids).logits
        speed_up(model, packed, PLENTY).make_copies()
        assert (model(ids).logits - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (LinearPolicy(), ""),
        (
            LinearPolicy(Form.NATIVE, Form.REORDERED),
            "linear layers: up to 2 rows as matrix-vector products, "
            "more with weights reordered for oneDNN",
        ),
        (LinearPolicy(Form.NATIVE), "linear layers: up to 2 rows as matrix-vector products"),
        (
            LinearPolicy(Form.OWN, Form.REORDERED),
            "linear layers: more than 2 rows with weights reordered for oneDNN",
        ),
        (
            LinearPolicy(Form.PACKED, Form.PACKED),
            "linear layers: in float32 with weights packed as float16",
        ),
        (
            LinearPolicy(Form.WIDENED, Form.WIDENED),
            "linear layers: in float32 with widened weights",
        ),
    ],
)
def test_a_policy_is_told_to_operators(policy: LinearPolicy, text: str) -> None:
    assert str(policy) == text


@pytest.mark.parametrize(
    ("policy", "itemsize", "expected"),
    [
        (LinearPolicy(), 2, 0),
        (LinearPolicy(Form.NATIVE, Form.REORDERED), 2, 2),
        (LinearPolicy(Form.REORDERED, Form.REORDERED), 4, 4),
        (LinearPolicy(Form.PACKED, Form.REORDERED), 2, 4),
        (LinearPolicy(Form.WIDENED, Form.WIDENED), 2, 4),
    ],
)
def test_copies_take_memory(policy: LinearPolicy, itemsize: int, expected: int) -> None:
    assert policy.bytes_of(itemsize) == expected
