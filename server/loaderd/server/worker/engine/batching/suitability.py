"""Whether a model can be served by the batching engine: by what it says, then by trying."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from loaderd.server.worker import devices
from loaderd.server.worker.engine.batching.attention import NAME
from loaderd.server.worker.engine.batching.feed import Feed
from loaderd.server.worker.engine.batching.forward import Forward, ModuleForward
from loaderd.server.worker.engine.batching.kv_cache import KvCache
from loaderd.server.worker.engine.batching.native.kernels import Kernels, Rows
from loaderd.server.worker.engine.batching.runner import Runner
from loaderd.server.worker.engine.batching.static_step import Graphs, StaticSteps
from loaderd.server.worker.layers import input_device

logger = logging.getLogger(__name__)

_PROMPTS = (range(1009, 5000, 331), range(2003, 9000, 719))
"""Token ids to try it with, modulo the vocabulary: no runs of special tokens, which models
were not trained on and which blow rounding up."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Largest deviation of logits, as a share of their own deviation, that is rounding."""
_WHOLE_SEQUENCE_ROPES = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that change for all tokens when one sequence grows long."""


class UnsuitableError(Exception):
    """The model cannot be served; the text says why, to operators."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What trying a model brought.

    Attributes:
        bytes_per_token: Of keys and values, over all layers of a device.
        windows: By layer, how far it looks back; None for all the way.
    """

    bytes_per_token: Mapping[torch.device, int]
    windows: Mapping[int, int | None]
    _expected: list[torch.Tensor]
    _kernels: Kernels | None

    def agree(self, model: PreTrainedModel, forward: Forward) -> bool:
        """Whether another way to run the model computes the same."""
        try:
            _try(model, _runner(model, forward, self._kernels), self._expected)
        except UnsuitableError as error:
            logger.info("another way to run it: %s", error)
            return False
        except Exception as error:
            if devices.is_broken(error) or devices.is_out_of_memory(error):
                raise
            logger.warning("another way to run it does not work: %r", error)
            return False
        return True

    def check_static(self, model: PreTrainedModel, forward: Forward, graphs: Graphs) -> None:
        """Checks that decode steps can be recorded, and compute the same when they are replayed.

        Raises:
            UnsuitableError: They cannot, or do not.
        """
        cache, device = _cache(model, spare=True), input_device(model)
        static = StaticSteps(forward, cache, device, graphs, patience=0)
        _try(model, Runner(forward, cache, device, static=static), self._expected)
        if static.failure is not None:
            raise UnsuitableError(static.failure)


def examine(model: PreTrainedModel, kernels: Kernels | None = None) -> Findings:
    """Gives the model our attention function and checks that it computes the same.

    Args:
        model: Changed in place.
        kernels: For attention; None for torch's.

    Raises:
        UnsuitableError: It does not; the model has its own attention again.
    """
    config = model.config.get_text_config(decoder=True)
    _check_claims(model, config)
    if kernels is not None:
        _check_long_rows(kernels)
    own = model.config._attn_implementation
    expected = [_own_logits(model, prompt) for prompt in _prompts(model)]
    try:
        model.set_attn_implementation(NAME)
        runner = _runner(model, ModuleForward(model), kernels)
        _try(model, runner, expected)
        _check_windows(runner.windows, config)
        return Findings(runner.cache.bytes_per_token, runner.windows, expected, kernels)
    except UnsuitableError:
        model.set_attn_implementation(own)
        raise
    except Exception as error:
        if devices.is_broken(error) or devices.is_out_of_memory(error):
            raise
        model.set_attn_implementation(own)
        kind = type(error).__name__
        raise UnsuitableError(f"its attention does not work in batches ({kind})") from error


def _check_claims(model: PreTrainedModel, config: Any) -> None:
    if not model._supports_attention_backend:
        raise UnsuitableError("its attention cannot be replaced")
    if model.config.is_encoder_decoder:
        raise UnsuitableError("it has an encoder")
    ropes = _WHOLE_SEQUENCE_ROPES & set(_rope_types(getattr(config, "rope_parameters", None)))
    if ropes:
        raise UnsuitableError(f"its {min(ropes)} rotary embedding depends on the whole sequence")
    if getattr(config, "attention_chunk_size", None):
        raise UnsuitableError("its attention is chunked")


def _check_long_rows(kernels: Kernels) -> None:
    """Of more tokens than the model is tried with: in several blocks, divided among threads."""
    lengths, window = (700, 300), 600
    random = torch.Generator().manual_seed(0)
    for dtype in _TOLERANCE:
        cached = torch.randn(2, len(lengths), 2, max(lengths), 64, generator=random).to(dtype)
        query = torch.randn(len(lengths), 4, 64, generator=random).to(dtype)
        new = torch.randn(2, len(lengths), 2, 64, generator=random).to(dtype)
        places = Rows(torch.arange(len(lengths)), torch.tensor(lengths) - 1)
        found = kernels.attend(
            query, new[0], new[1], (cached[0], cached[1]), places, window=window, scaling=0.1
        )
        for row, length in enumerate(lengths):
            before = cached[:, row, :, : length - 1]
            keys, values = torch.cat([before, new[:, row, :, None]], 2)[:, :, -window:].float()
            expected = scaled_dot_product_attention(
                query[row, :, None].float(), keys, values, scale=0.1, enable_gqa=True
            )
            rounding = torch.finfo(dtype).eps
            if not torch.allclose(found[row].float(), expected[:, 0], rounding, 1e-5):
                raise UnsuitableError("the kernels that were compiled compute something else")


def _rope_types(parameters: object) -> Iterator[str]:
    """Also of configurations that have one for each type of layer."""
    if isinstance(parameters, Mapping):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for nested in parameters.values():
            yield from _rope_types(nested)


def _prompts(model: PreTrainedModel) -> list[list[int]]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return [[token % vocabulary for token in prompt] for prompt in _PROMPTS]


def _own_logits(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt], device=input_device(model))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0].float()


def _cache(model: PreTrainedModel, *, spare: bool = False) -> KvCache:
    prompts = _prompts(model)
    return KvCache(len(prompts), max(map(len, prompts)), blocks=0, spare=spare)


def _runner(model: PreTrainedModel, forward: Forward, kernels: Kernels | None) -> Runner:
    return Runner(forward, _cache(model), input_device(model), kernels=kernels)


def _try(model: PreTrainedModel, runner: Runner, expected: list[torch.Tensor]) -> None:
    """The prompts side by side: two pieces each, then token by token."""
    prompts = _prompts(model)
    shortest = min(map(len, prompts))
    cuts = [0, shortest // 2, shortest - 3, *range(shortest - 2, shortest + 1)]
    found: list[torch.Tensor] = []
    own: list[torch.Tensor] = []
    for begin, end in itertools.pairwise(cuts):
        feeds = [
            Feed(slot, begin, prompt[begin:end], wants=end - begin)
            for slot, prompt in enumerate(prompts)
        ]
        found.append(runner.run(feeds))
        own.append(torch.cat([logits[begin:end] for logits in expected]))
    # Apart, because the fewer could be wrong among the many.
    for pieces in (slice(2), slice(2, None)):
        _compare(torch.cat(found[pieces]), torch.cat(own[pieces]), model.dtype)


def _compare(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    # Most tokens, not all: a mixture of experts may rightly choose others after rounding.
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    deviation = ((found - expected).norm(dim=-1) / spread).median()
    if not deviation <= _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16]):
        raise UnsuitableError("its logits differ when it runs in batches")


def _check_windows(windows: Mapping[int, int | None], config: Any) -> None:
    """A window longer than what was tried shows only in what its layers asked for."""
    layers = config.num_hidden_layers
    if set(windows) != set(range(layers)):
        raise UnsuitableError("it has layers that keep another state than keys and values")
    types = getattr(config, "layer_types", None)
    if types is None:
        uses = getattr(config, "use_sliding_window", True)
        windowed = bool(uses and getattr(config, "sliding_window", None))
        if windowed and not any(windows.values()):
            raise UnsuitableError("its layers do not tell their sliding windows")
        return
    for index, kind in enumerate(types):
        if kind not in {"full_attention", "sliding_attention"}:
            raise UnsuitableError(f"it has layers of type {kind}")
        if kind == "sliding_attention" and not windows[index]:
            raise UnsuitableError("its layers do not tell their sliding windows")
