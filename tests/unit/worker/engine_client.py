"""An engine with a tiny model, and what comes out of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from loaderd.server.worker.detokenizer import Decoder
from loaderd.server.worker.engine.batching.build import batching_engine
from loaderd.server.worker.engine.batching.native.compiler import NotCompiledError
from loaderd.server.worker.engine.batching.native.kernels import Kernels
from loaderd.server.worker.engine.completion import Tokenizer
from loaderd.server.worker.engine.parameters import typed_request
from loaderd.server.worker.engine.protocol import Engine
from loaderd.server.worker.engine.sequential import SequentialEngine
from loaderd.server.worker.facts import model_facts
from loaderd.v1.generation_pb2 import StreamGenerateRequest
from loaderd.worker.v1 import worker_pb2
from tests.unit.worker.outputs import Outputs

TIMEOUT = 60.0
VOCABULARY = 97
EOS = 1
PROMPT = [5, 9, 5, 60, 33]
CONTEXT = 256
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64, "num_key_value_heads": 2, "num_attention_heads": 4},
    "gpt2": {"n_head": 4, "n_inner": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 4},
    "falcon": {"num_attention_heads": 4, "initializer_range": 0.5},
    "mamba": {"state_size": 8, "num_heads": 4},
}
TOKENIZER_SPECIAL_IDS = frozenset({EOS})


def no_kernels() -> Kernels:
    """Where there is no compiler."""
    raise NotCompiledError("there is no C compiler")


class Numbers:
    """A tokenizer that writes token ids as numbers."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)


class Client:
    """An engine and what comes out of it."""

    def __init__(
        self,
        model: Any,
        engine: str = "sequential",
        *,
        decoder: Decoder | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self._decoder = decoder or Numbers()
        self.facts = model_facts(model)
        self.steps = 0
        self.reports: list[worker_pb2.EngineReport] = []
        self.reason = ""
        self.died = threading.Event()
        self._outputs: dict[int, Outputs] = {}
        self._changed = threading.Condition()
        self.engine = self._engine(engine, **options)

    def _engine(self, name: str, **options: Any) -> Engine:
        tokenizer = Tokenizer(self._decoder, TOKENIZER_SPECIAL_IDS)
        if name == "batching":
            engine, self.reason, _ = batching_engine(
                self.model,
                tokenizer,
                "org/name",
                self._take,
                on_death=self.died.set,
                context_length=self.facts.context_length,
                **options,
            )
            return engine
        return SequentialEngine(
            self.model, tokenizer, "org/name", self._take, on_death=self.died.set
        )

    def _take(self, outputs: Sequence[worker_pb2.Output]) -> None:
        with self._changed:
            if outputs[0].HasField("report"):
                self.reports.append(outputs[0].report)
            else:
                self.steps += 1
                for output in outputs:
                    self._outputs[output.key].add(output)
            self._changed.notify_all()

    def start(
        self,
        prompt: Sequence[int] = PROMPT,
        bad_word_ids: Sequence[Sequence[int]] = (),
        **fields: Any,
    ) -> int:
        key = len(self._outputs) + 1
        self._outputs[key] = Outputs()
        request = StreamGenerateRequest(model="m", request_id=f"r{key}", **fields)
        arrived = time.monotonic()
        self.engine.submit(
            typed_request(
                request,
                key=key,
                prompt=prompt,
                arrived=arrived,
                facts=self.facts,
                bad_words=bad_word_ids,
            )
        )
        return key

    def wait(self, key: int, condition: Callable[[Outputs], bool] = lambda o: o.ended) -> Outputs:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self._outputs[key]), TIMEOUT)
            return self._outputs[key]

    def generate(self, prompt: Sequence[int] = PROMPT, **fields: Any) -> Outputs:
        return self.wait(self.start(prompt, **fields))

    def token_ids(self, prompt: Sequence[int] = PROMPT, **fields: Any) -> list[int]:
        return self.generate(prompt, return_token_ids=True, **fields).token_ids


def build(architecture: str, **sizes: Any) -> Any:
    """A tiny model with random weights."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "initializer_range": 1.0 if architecture == "mamba" else 0.3,
    }
    if architecture != "mamba":
        common["max_position_embeddings"] = CONTEXT
    config = AutoConfig.for_model(architecture, **common | SIZES.get(architecture, {}) | sizes)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=EOS)
    return model


def reference(model: Any, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    """What transformers generates by itself."""
    ids = torch.tensor([prompt], device=model.device)
    # An engine may have taken the model's own options away.
    options = {"eos_token_id": EOS, "pad_token_id": EOS} | options
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def before_each_pass(
    model: Any, monkeypatch: pytest.MonkeyPatch, act: Callable[[torch.Tensor], None]
) -> None:
    """Calls `act` with the positions of each forward pass of a Llama, however it is run."""
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def acting(hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        act(position_ids)
        return forward(hidden, position_ids)

    monkeypatch.setattr(rotary, "forward", acting)


class Gate:
    """Holds the model's forward passes until it is opened."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        before_each_pass(model, monkeypatch, self._wait)

    def _wait(self, _positions: torch.Tensor) -> None:
        self.entered.set()
        assert self.open.wait(TIMEOUT)


def fail_once(model: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next forward pass fail."""
    failed = threading.Event()

    def fail(_positions: torch.Tensor) -> None:
        if not failed.is_set():
            failed.set()
            raise error

    before_each_pass(model, monkeypatch, fail)
