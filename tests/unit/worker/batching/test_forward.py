from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loaderd.server.worker.engine.batching import forward
from loaderd.server.worker.engine.batching.feed import Feed
from loaderd.server.worker.engine.batching.forward import FlatForward, ModuleForward, can_flatten
from loaderd.server.worker.engine.batching.kernels import PLAIN, Form, LinearPolicy
from loaderd.server.worker.engine.batching.kv_cache import KvCache
from loaderd.server.worker.engine.batching.linear import speed_up
from loaderd.server.worker.engine.batching.native import forward as native
from loaderd.server.worker.engine.batching.native.forward import NativeForward
from loaderd.server.worker.engine.batching.native.kernels import Kernels, kernels_of_this_cpu
from loaderd.server.worker.engine.batching.runner import Runner
from loaderd.server.worker.engine.batching.suitability import UnsuitableError, examine
from tests.unit.worker.engine_client import Client, build, no_kernels, reference

_GLU = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
FLAT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GLU),
    "llama with biases": ("llama", {**_GLU, "attention_bias": True, "mlp_bias": True}),
    "llama with tied weights": ("llama", {**_GLU, "tie_word_embeddings": True}),
    "llama with wide heads": ("llama", {**_GLU, "head_dim": 12}),
    "llama 3": (
        "llama",
        {
            **_GLU,
            "rope_parameters": {
                **_ROPE,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("mistral", {**_GLU, "sliding_window": 8}),
    "qwen2": ("qwen2", _GLU),
    "qwen3": ("qwen3", {**_GLU, "head_dim": 8}),
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {**_GLU, "head_dim": 8},
    "gpt2": {},
    "mixtral": {**_GLU, "num_local_experts": 4, "num_experts_per_tok": 2},
}
PROMPTS = [[(7 * n + 3 * place) % 97 for place in range(20)] for n in range(3)]


def logits_of(run: Any, kernels: Kernels | None = None) -> torch.Tensor:
    """Of prompts side by side, in pieces and token by token, each one step behind the last."""
    cache = KvCache(len(PROMPTS), 20, blocks=0)
    runner = Runner(run, cache, torch.device("cpu"), kernels=kernels)
    parts = []
    pieces = list(itertools.pairwise([0, 9, 15, *range(16, 21)]))
    for step in range(len(pieces) + len(PROMPTS) - 1):
        feeds = []
        for slot, prompt in enumerate(PROMPTS):
            if 0 <= step - slot < len(pieces):
                begin, end = pieces[step - slot]
                wants = 1 + slot % (end - begin)
                feeds.append(Feed(slot, begin, prompt[begin:end], wants))
        parts.append(runner.run(feeds))
    return torch.cat(parts)


@pytest.mark.parametrize("form", [Form.OWN, Form.WIDENED])
@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_flat_is_the_same_as_module_by_module(
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    form: Form,
    kernels: Kernels,
) -> None:
    architecture, sizes = FLAT[name]
    model = build(architecture, **sizes).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)  # norms and biases that do something
    findings = examine(model)
    expected = logits_of(ModuleForward(model))
    assert not can_flatten(model), "its layers are not fused yet"
    linears = speed_up(model, LinearPolicy(form, form), 2**40)
    linears.make_copies()
    assert can_flatten(model)
    assert native.can_run(model)
    flat = FlatForward(model, findings.windows, linears.policy.activations)
    compiled = NativeForward(model, findings.windows, kernels)
    for run, own in ((flat, None), (compiled, None), (compiled, kernels)):
        assert (logits_of(run, own) - expected).abs().max() < tolerance * expected.std() * 4
        assert findings.agree(model, run)


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_layers_are_not_flattened(architecture: str) -> None:
    model = build(architecture, **OTHERS[architecture])
    examine(model)
    speed_up(model, PLAIN, 2**40)
    assert not can_flatten(model)


def reason(model: Any, find_kernels: Callable[[], Kernels] = kernels_of_this_cpu) -> str:
    client = Client(model, "batching", find_kernels=find_kernels)
    client.engine.close()
    return client.reason


def test_an_engine_tells_how_it_runs_the_model(kernels: Kernels) -> None:
    model = build("llama", **_GLU)
    assert "one sequence of operators, most of them compiled for" in reason(copy.deepcopy(model))
    without = reason(model, no_kernels)
    assert "one sequence of operators; no kernels were compiled: there is no C comp" in without
    assert "module by module" in reason(build("gpt2"))


def test_what_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels
) -> None:
    def wrong(cls: Any, norm: Any) -> Any:
        return cls(norm.weight.detach() * 1.1, norm.variance_epsilon)

    monkeypatch.setattr(native._Norm, "of", classmethod(wrong))
    assert reason(build("llama", **_GLU)).endswith("as one sequence of operators")
    norm = forward._norm
    monkeypatch.setattr(forward, "_norm", lambda *args: lambda x: norm(*args)(x) * 1.1)
    assert "module by module" in reason(build("llama", **_GLU))


def test_what_does_not_work_is_not_used(kernels: Kernels) -> None:
    model = build("llama", **_GLU).double()  # the kernels have no such type
    assert reason(model).endswith("as one sequence of operators")


def test_heads_too_wide_for_a_stack_are_left_to_torch() -> None:
    model = build("llama", **_GLU, head_dim=8192)
    examine(model)
    speed_up(model, PLAIN, 2**40)
    assert can_flatten(model)
    assert not native.can_run(model)


def test_kernels_with_which_attention_is_another_are_not_used(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels
) -> None:
    attend = Kernels.attend
    monkeypatch.setattr(Kernels, "attend", lambda *args, **rest: attend(*args, **rest) * 1.5)
    expected = reference(build("gpt2"), do_sample=False, max_new_tokens=9, eos_token_id=None)
    client = Client(build("gpt2"), "batching")
    assert client.token_ids(max_new_tokens=9, do_sample=False, ignore_eos=True) == expected
    client.engine.close()


@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_kernels_that_are_wrong_only_in_long_rows_are_not_used(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels, wrong: float
) -> None:
    attend = Kernels.attend

    def attend_badly(*args: Any, **rest: Any) -> torch.Tensor:
        attended = attend(*args, **rest)
        attended[args[-1].positions > 500] *= wrong
        return attended

    monkeypatch.setattr(Kernels, "attend", attend_badly)
    model = build("llama", **_GLU)
    with pytest.raises(UnsuitableError, match="compute something else"):
        examine(model, kernels)
    assert reason(model).endswith("as one sequence of operators")
