"""What is known of a loaded model: for checking requests, and for clients to see."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loaderd.server.box.dtype import DtypeChoice
from loaderd.server.worker.engine.parameters import ModelFacts, SamplingDefaults
from loaderd.server.worker.engine.protocol import Engine
from loaderd.server.worker.layers import layer_devices, offloaded_bytes, weights_of
from loaderd.server.worker.quantization import count_bytes, count_numbers
from loaderd.v1.model_pb2 import Dtype, ModelDetails, Quantization

TORCH_DTYPES = {
    Dtype.DTYPE_FLOAT16: torch.float16,
    Dtype.DTYPE_BFLOAT16: torch.bfloat16,
    Dtype.DTYPE_FLOAT32: torch.float32,
}
"""Dtypes of the protocol, as torch calls them."""

_BOUNDS: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0.001 <= value <= 100,  # 0 says that it does not sample
    "top_k": lambda value: value >= 0,
    "top_p": lambda value: 0 < value <= 1,
    "min_p": lambda value: 0 <= value <= 1,
    "typical_p": lambda value: 0 < value <= 1,
    "repetition_penalty": lambda value: 0.01 <= value <= 100,
    "no_repeat_ngram_size": lambda value: value >= 0,
}

# Configurations have one of these, or map it to a name of their own; recurrent ones have none.
_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len")


def model_facts(model: PreTrainedModel) -> ModelFacts:
    """What requests to this model are checked against."""
    config = model.config.get_text_config(decoder=True)
    size = int(config.vocab_size)
    lengths = (getattr(config, name, None) for name in _CONTEXT_NAMES)
    return ModelFacts(
        context_length=next((int(length) for length in lengths if length and length > 0), 0),
        vocabulary_size=size,
        # Others never come, and nothing may be looked up by them.
        eos_token_ids=tuple(
            token_id
            for token_id in _token_ids(model.generation_config.eos_token_id)
            if 0 <= token_id < size
        ),
        defaults=_sampling_defaults(model.generation_config),
    )


def model_details(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: DtypeChoice,
    engine: Engine,
    engine_reason: str,
    *,
    quantization: Quantization.ValueType = Quantization.QUANTIZATION_UNSPECIFIED,
    quantization_reason: str = "",
) -> ModelDetails:
    """What clients get to know of this model."""
    parameters = weights_of(model)
    return ModelDetails(
        architecture=type(model).__name__,
        dtype=dtype.dtype,
        dtype_reason=dtype.reason,
        engine=engine.name,
        engine_reason=engine_reason,
        context_length=model_facts(model).context_length,
        parameter_count=sum(map(count_numbers, parameters)),
        weight_bytes=sum(map(count_bytes, parameters)),
        device_map=layer_devices(model),
        offloaded_bytes=offloaded_bytes(model),
        has_chat_template=tokenizer.chat_template is not None,
        supported_parameters=sorted(engine.supported_parameters),
        worker_pid=os.getpid(),
        quantization=quantization,
        quantization_reason=quantization_reason,
    )


def _token_ids(token_ids: int | list[int] | None) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    return (token_ids,) if isinstance(token_ids, int) else tuple(token_ids)


def _sampling_defaults(config: Any) -> SamplingDefaults:
    """The model's own defaults; those that no request could ask for count as not there."""
    neutral = SamplingDefaults()

    def own(name: str) -> Any:
        value = getattr(config, name)
        allowed = _BOUNDS.get(name)
        if value is None or (allowed is not None and not allowed(value)):
            return getattr(neutral, name)
        return value

    return SamplingDefaults(
        do_sample=bool(own("do_sample")) and config.temperature != 0,
        temperature=float(own("temperature")),
        top_k=int(own("top_k")),
        top_p=float(own("top_p")),
        min_p=float(own("min_p")),
        typical_p=float(own("typical_p")),
        repetition_penalty=float(own("repetition_penalty")),
        no_repeat_ngram_size=int(own("no_repeat_ngram_size")),
    )
