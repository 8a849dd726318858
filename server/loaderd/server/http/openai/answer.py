"""What chat and completions tell of a generation, each in its own shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from loaderd.v1 import generation_pb2
from loaderd.v1.generation_pb2 import FinishReason, TokenLogprob

_FINISHES = {
    FinishReason.FINISH_REASON_STOP: "stop",
    FinishReason.FINISH_REASON_LENGTH: "length",
}


class Answer(ABC):
    """The answer to one request.

    Args:
        request_id: The request's.
        created: Seconds since 1970.
        model: The model, as the client calls it.

    Attributes:
        id: Names the answer.
        fingerprint: Tells one loaded model from another; set when it is known.
    """

    id_prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, request_id: str, created: int, model: str) -> None:
        self.id = self.id_prefix + request_id
        self.fingerprint: str | None = None
        self._created = created
        self._model = model

    def envelope(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What an answer, or a part of one, has around its choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
        }

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        """A part of an answer."""
        return self.envelope(self.chunk_kind, choices)

    def whole(self, response: generation_pb2.GenerateResponse) -> dict[str, Any]:
        """The whole answer."""
        self.fingerprint = response.model_id
        choices = [self.completion(each) for each in response.completions]
        return {**self.envelope(self.kind, choices), "usage": usage(response.usage)}

    @abstractmethod
    def opening(self, count: int) -> list[dict[str, Any]]:
        """The choices of the first parts, before there is any text.

        Args:
            count: How many completions there will be.
        """

    @abstractmethod
    def delta(self, delta: generation_pb2.GenerationDelta) -> dict[str, Any]:
        """New text of a completion."""

    @abstractmethod
    def ending(self, index: int, finish: generation_pb2.Finish) -> dict[str, Any]:
        """The end of a completion."""

    @abstractmethod
    def completion(self, completion: generation_pb2.Completion) -> dict[str, Any]:
        """A whole completion."""


def finish_reason(finish: generation_pb2.Finish) -> str:
    """Why a completion ended; one that was cut short for another reason counts as too long."""
    return _FINISHES.get(finish.reason, "length")


def usage(counts: generation_pb2.Usage) -> dict[str, Any]:
    """Token counts."""
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.generated_tokens,
        "total_tokens": counts.prompt_tokens + counts.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_prompt_tokens},
    }


def token_bytes(token: TokenLogprob | generation_pb2.TokenAlternative) -> list[int] | None:
    """The bytes of a token's text; None where it is no whole character."""
    return None if "\ufffd" in token.text else list(token.text.encode())
