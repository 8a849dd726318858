import os
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from loaderd.server.box.dtype import DtypeChoice
from loaderd.server.worker.engine.parameters import SamplingDefaults
from loaderd.server.worker.engine.sequential import SequentialEngine
from loaderd.server.worker.facts import model_details, model_facts
from loaderd.v1.model_pb2 import Dtype

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 77},
    "gpt2": {"n_head": 2, "n_positions": 66},
    "mpt": {"n_heads": 2, "max_seq_len": 55},
    "mamba": {},
}


class Tokenizer:
    chat_template = "x"


def build(architecture: str) -> Any:
    config = AutoConfig.for_model(
        architecture, vocab_size=30, hidden_size=16, num_hidden_layers=1, **SIZES[architecture]
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("architecture", "length"), [("llama", 77), ("gpt2", 66), ("mpt", 55), ("mamba", 0)]
)
def test_the_context_length_is_the_configs(architecture: str, length: int) -> None:
    assert model_facts(build(architecture)).context_length == length


@pytest.mark.parametrize(("own", "expected"), [(None, ()), (3, (3,)), ([3, 4], (3, 4)), (0, (0,))])
def test_end_of_sequence_tokens(own: int | list[int] | None, expected: tuple[int, ...]) -> None:
    model = build("llama")
    model.generation_config = GenerationConfig(eos_token_id=own)
    assert model_facts(model).eos_token_ids == expected


def test_sampling_defaults_are_the_models_own_else_neutral() -> None:
    model = build("llama")
    model.generation_config = GenerationConfig()
    assert model_facts(model).defaults == SamplingDefaults()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_k=0, min_p=0.1)
    expected = SamplingDefaults(do_sample=True, temperature=0.6, top_k=0, min_p=0.1)
    assert model_facts(model).defaults == expected


@pytest.mark.parametrize(
    "own",
    [{"top_k": -1}, {"top_p": 0.0}, {"temperature": 1e-39}, {"repetition_penalty": 0.0}],
)
def test_own_defaults_that_no_request_could_ask_for_count_as_not_there(own: Any) -> None:
    model = build("llama")
    model.generation_config = GenerationConfig(do_sample=True)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert model_facts(model).defaults == SamplingDefaults(do_sample=True)


def test_an_own_temperature_of_zero_says_that_the_model_does_not_sample() -> None:
    model = build("llama")
    model.generation_config = GenerationConfig(do_sample=True)
    model.generation_config.temperature = 0.0
    assert model_facts(model).defaults == SamplingDefaults(do_sample=False)


def test_details() -> None:
    model = build("llama").to(torch.bfloat16)
    engine = SequentialEngine
    choice = DtypeChoice(Dtype.DTYPE_BFLOAT16, "asked for")
    details = model_details(model, Tokenizer(), choice, engine, "why")  # type: ignore[arg-type]
    assert details.architecture == "LlamaForCausalLM"
    assert details.weight_bytes == 2 * details.parameter_count > 0
    assert dict(details.device_map) == {"": "cpu"}
    assert (details.engine, details.engine_reason) == ("sequential", "why")
    assert details.has_chat_template
    assert details.worker_pid == os.getpid()
    assert set(details.supported_parameters) == engine.supported_parameters
