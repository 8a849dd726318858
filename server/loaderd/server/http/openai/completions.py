"""/v1/completions: what is asked, and how it is answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.server.http.openai.answer import Answer, finish_reason
from loaderd.server.http.openai.asked import Asked, read_common
from loaderd.server.http.openai.fields import Fields, bounded, token_id
from loaderd.v1 import generation_pb2
from loaderd.v1.generation_pb2 import StreamGenerateRequest

DEFAULT_MAX_TOKENS = 16
"""As the API says."""
_MOST_LOGPROBS = 20


def read_completion(fields: Fields) -> Asked:
    """What a request asks for.

    Raises:
        LoaderdError: A field is wrong, or is not honoured.
    """
    names = {"max_new_tokens": "max_tokens", "text": "prompt", "token_ids": "prompt"}
    asked = read_common(fields, {**names, "top_logprobs": "logprobs"})
    request = asked.request
    request.max_new_tokens = DEFAULT_MAX_TOKENS
    fields.put(request, "max_new_tokens", "max_tokens")
    fields.put(request, "best_of", "best_of")
    fields.put(request, "echo", "echo")
    fields.put(request, "add_special_tokens", "add_special_tokens")
    most = fields.take_any("logprobs")
    if most is not None:
        request.logprobs = True
        request.top_logprobs = bounded("logprobs", most, 0, _MOST_LOGPROBS)
    if most is not None and request.echo:
        raise UnsupportedOptionError("echo", "does not go with logprobs")
    _read_prompt(fields, request)
    fields.refuse_rest()
    return asked


def _read_prompt(fields: Fields, request: StreamGenerateRequest) -> None:
    prompt = fields.take_any("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        request.text = prompt
    elif not isinstance(prompt, list) or not prompt:
        raise InvalidArgumentError("prompt", "must be a string or a list of token ids")
    elif isinstance(prompt[0], str | list):
        raise UnsupportedOptionError("prompt", "must be one; send a request for each")
    else:
        request.token_ids.ids.extend(token_id("prompt", each) for each in prompt)


class TextAnswer(Answer):
    """A text that goes on."""

    id_prefix = "cmpl-"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, request_id: str, created: int, model: str) -> None:
        super().__init__(request_id, created, model)
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def opening(self, count: int) -> list[dict[str, Any]]:  # noqa: ARG002 - the base's signature
        """Nothing."""
        return []

    def delta(self, delta: generation_pb2.GenerationDelta) -> dict[str, Any]:
        """New text."""
        return self._choice(delta.index, delta.text, delta.logprobs, None)

    def ending(self, index: int, finish: generation_pb2.Finish) -> dict[str, Any]:
        """The end."""
        return self._choice(index, "", (), finish_reason(finish))

    def completion(self, completion: generation_pb2.Completion) -> dict[str, Any]:
        """A whole text."""
        reason = finish_reason(completion.finish)
        return self._choice(completion.index, completion.text, completion.logprobs, reason)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Iterable[generation_pb2.TokenLogprob],
        reason: str | None,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(
        self, index: int, tokens: Iterable[generation_pb2.TokenLogprob]
    ) -> dict[str, Any] | None:
        listed = list(tokens)
        if not listed:
            return None
        offsets = []
        for token in listed:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [token.text for token in listed],
            "token_logprobs": [token.logprob for token in listed],
            "top_logprobs": [{each.text: each.logprob for each in token.top} for token in listed],
            "text_offset": offsets,
        }
