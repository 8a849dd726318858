"""A real worker process with a real model."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.duration_pb2 import Duration
from transformers import AutoModelForCausalLM, AutoTokenizer

from loaderd.v1.errors_pb2 import ErrorReason
from loaderd.v1.generation_pb2 import (
    ApplyChatTemplateRequest,
    ChatMessage,
    ChatMessages,
    DetokenizeRequest,
    FinishReason,
    TokenIds,
    TokenizeRequest,
)
from loaderd.v1.model_pb2 import Dtype
from tests.integration.worker.harness import Worker

TEXT = "The sky is blue because"
# Asked otherwise, rounding decides whether the model answers in French.
CHAT = ChatMessages(messages=[ChatMessage(role="user", content="Name the capital of France.")])


def test_greedy_output_is_that_of_transformers(worker: Worker, real_model: Path) -> None:
    dtypes = {Dtype.DTYPE_FLOAT16: torch.float16, Dtype.DTYPE_BFLOAT16: torch.bfloat16}
    dtype = dtypes.get(worker.details.dtype, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=dtype)
    inputs = tokenizer(TEXT, return_tensors="pt")
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0].tolist()
    outputs = worker.generate(
        text=TEXT, do_sample=False, max_new_tokens=16, return_token_ids=True, echo=True
    )
    assert outputs.token_ids == expected[-16:]
    assert outputs.text == tokenizer.decode(expected)


def test_the_loaded_model_is_described(worker: Worker) -> None:
    details = worker.details
    assert details.architecture == "LlamaForCausalLM"
    assert details.engine == "batching"
    assert details.context_length == 8192
    assert details.parameter_count == 134_515_008
    assert details.weight_bytes in {2 * details.parameter_count, 4 * details.parameter_count}
    assert details.has_chat_template
    assert details.worker_pid == worker.process.pid
    assert details.dtype_reason
    assert "temperature" in details.supported_parameters


def test_a_chat_ends_at_the_end_of_its_turn(worker: Worker) -> None:
    outputs = worker.generate(messages=CHAT, do_sample=False, max_new_tokens=60)
    assert "Paris" in outputs.text
    assert "<|" not in outputs.text
    assert outputs.finish.reason == FinishReason.FINISH_REASON_STOP
    assert outputs.finish.eos_token_id == 2
    assert outputs.started is not None
    assert outputs.finished is not None
    assert outputs.started.request_id == "r1" or outputs.started.request_id.startswith("r")
    assert outputs.started.prompt_tokens == outputs.finished.usage.prompt_tokens > 10


def test_text_is_streamed_as_it_comes(worker: Worker) -> None:
    outputs = worker.generate(text=TEXT, do_sample=False, max_new_tokens=12)
    assert len(outputs.deltas) >= 10


def test_a_stop_string_across_tokens_ends_the_output(worker: Worker) -> None:
    whole = worker.generate(text=TEXT, do_sample=False, max_new_tokens=20)
    border = len(whole.deltas[2].text) + len(whole.deltas[1].text) + len(whole.deltas[0].text)
    stop = whole.text[border - 2 : border + 2]
    before = whole.text[: whole.text.index(stop)]
    outputs = worker.generate(text=TEXT, do_sample=False, max_new_tokens=20, stop=[stop])
    assert (outputs.text, outputs.finish.stop_string) == (before, stop)
    outputs = worker.generate(
        text=TEXT, do_sample=False, max_new_tokens=20, stop=[stop], include_stop_str_in_output=True
    )
    assert outputs.text == before + stop


def test_seeded_samples_repeat(worker: Worker) -> None:
    options: dict[str, Any] = {"text": TEXT, "temperature": 1.5, "max_new_tokens": 12}
    first = worker.generate(seed=2**64 - 1, **options)
    assert first.started is not None
    assert first.started.seed == 2**64 - 1
    assert worker.generate(seed=2**64 - 1, **options).text == first.text
    assert worker.generate(seed=1, **options).text != first.text


def test_a_running_request_is_cancelled(worker: Worker) -> None:
    key = worker.start(text=TEXT, max_new_tokens=4000, ignore_eos=True)
    worker.wait_for_delta(key)
    worker.cancel(key)
    outputs = worker.outputs(key)
    assert outputs.finish.reason == FinishReason.FINISH_REASON_CANCELLED
    assert outputs.finished is not None
    assert 0 < outputs.finished.usage.generated_tokens < 4000


def test_a_request_among_others_can_be_cancelled(worker: Worker) -> None:
    first, cancelled, last = (
        worker.start(text=TEXT, max_new_tokens=tokens, do_sample=False, ignore_eos=True)
        for tokens in (6, 8000, 6)
    )
    worker.cancel(cancelled)
    outputs = worker.outputs(cancelled)
    assert outputs.finish.reason == FinishReason.FINISH_REASON_CANCELLED
    assert worker.outputs(first).text == worker.outputs(last).text != ""


def test_a_cancel_right_behind_its_request_is_not_lost(worker: Worker) -> None:
    key = worker.start(text=TEXT, max_new_tokens=8000, ignore_eos=True)
    worker.cancel(key)
    assert worker.outputs(key).finish.reason == FinishReason.FINISH_REASON_CANCELLED


def test_time_runs_out(worker: Worker) -> None:
    outputs = worker.generate(
        text=TEXT, max_new_tokens=8000, ignore_eos=True, max_time=Duration(nanos=100_000_000)
    )
    assert outputs.finish.reason == FinishReason.FINISH_REASON_TIME
    assert outputs.text


def test_tokenizer_calls_are_answered_while_a_request_runs(worker: Worker) -> None:
    key = worker.start(text=TEXT, max_new_tokens=8000, ignore_eos=True)
    worker.wait_for_delta(key)
    tokens = worker.call(tokenize=TokenizeRequest(text="Hi there")).tokenize
    text = worker.call(detokenize=DetokenizeRequest(token_ids=tokens.token_ids)).detokenize.text
    asked = ApplyChatTemplateRequest(messages=CHAT.messages)
    rendered = worker.call(apply_chat_template=asked).apply_chat_template.text
    refused = worker.start(text=TEXT, temperature=-1.0)
    assert worker.outputs(refused).error is not None
    assert not worker.has_ended(key)
    worker.cancel(key)
    worker.outputs(key)
    assert text == "Hi there"
    assert "capital of France" in rendered


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"text": TEXT, "num_beams": 4, "n": 5}, "INVALID_ARGUMENT", "n"),
        ({"text": TEXT, "logit_bias": {3: 101.0}}, "INVALID_ARGUMENT", "logit_bias"),
        ({"text": TEXT, "temperature": float("nan")}, "INVALID_ARGUMENT", "temperature"),
        ({"text": ""}, "INVALID_ARGUMENT", "text"),
        ({}, "INVALID_ARGUMENT", "input"),
        ({"token_ids": TokenIds(ids=[49152])}, "INVALID_ARGUMENT", "token_ids"),
        ({"token_ids": TokenIds(ids=[5] * 8192)}, "INVALID_ARGUMENT", "token_ids"),
        ({"text": TEXT, "max_new_tokens": 8192}, "INVALID_ARGUMENT", "max_new_tokens"),
        ({"messages": ChatMessages()}, "INVALID_ARGUMENT", "messages"),
    ],
)
def test_bad_requests_are_refused_by_name(
    worker: Worker, fields: dict[str, Any], reason: str, field: str
) -> None:
    outputs = worker.generate(**fields)
    assert outputs.started is None
    assert outputs.error is not None
    assert ErrorReason.Name(outputs.error.reason) == f"ERROR_REASON_{reason}"
    assert outputs.error.metadata["field"] == field
    assert outputs.error.metadata["problem"]


def test_a_bad_call_is_refused(worker: Worker) -> None:
    reply = worker.call(detokenize=DetokenizeRequest(token_ids=[49152]))
    assert reply.error.reason == ErrorReason.ERROR_REASON_INVALID_ARGUMENT
    assert reply.error.metadata["field"] == "token_ids"


def test_a_second_load_changes_nothing(worker: Worker, tiny_model: Path) -> None:
    worker.send_load(tiny_model)
    assert worker.generate(text=TEXT, max_new_tokens=1).finished is not None


def test_heartbeats_tell_the_memory_that_is_held(worker: Worker) -> None:
    beats = [worker.expect("heartbeat") for _ in range(2)]
    assert all(beat.memory_bytes > worker.details.weight_bytes for beat in beats)


def test_the_log_has_ids_and_counts_and_nothing_that_users_wrote(worker: Worker) -> None:
    secret = "zanzibar"
    asked = [ChatMessage(role="user", content=secret), ChatMessage(role="", content=secret)]
    worker.generate(text=f"{secret} {secret}", max_new_tokens=3, stop=[secret])
    worker.generate(messages=ChatMessages(messages=asked))
    worker.generate(text=secret, temperature=-1.0)
    worker.call(tokenize=TokenizeRequest(text=secret))
    assert "prompt tokens" in worker.log
    assert secret not in worker.log
    assert "Warning" not in worker.log
    lines = [line for line in worker.log.splitlines() if "request r" in line]
    assert all(line.count(" ") < 14 for line in lines)
    assert len(set(itertools.chain(lines))) == len(lines)
