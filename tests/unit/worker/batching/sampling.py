"""Requests and logits for tests of the sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loaderd.server.worker.engine.parameters import ModelFacts, SamplingDefaults, typed_request
from loaderd.server.worker.engine.protocol import GenerationRequest
from loaderd.v1.generation_pb2 import StreamGenerateRequest, TokenIds

VOCABULARY = 40
EOS = 2
FACTS = ModelFacts(
    context_length=0, vocabulary_size=1 << 20, eos_token_ids=(EOS,), defaults=SamplingDefaults()
)


def asked(
    prompt: list[int] | None = None,
    bad_words: list[list[int]] | None = None,
    allowed: list[int] | None = None,
    **fields: Any,
) -> GenerationRequest:
    if allowed is not None:
        fields["allowed_token_ids"] = TokenIds(ids=allowed)
    request = StreamGenerateRequest(
        model="m", text="x", bad_words=["word"] * len(bad_words or []), **fields
    )
    return typed_request(
        request,
        key=1,
        prompt=prompt or [1],
        arrived=0.0,
        facts=FACTS,
        bad_words=bad_words or (),
    )


def random_logits(seed: int, *shape: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * spread
