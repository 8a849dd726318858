"""/v1/chat/completions: what is asked, and how it is answered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loaderd.server.errors import InvalidArgumentError, UnsupportedOptionError
from loaderd.server.http.openai.answer import Answer, finish_reason, token_bytes
from loaderd.server.http.openai.asked import Asked, read_common
from loaderd.server.http.openai.fields import Fields, checked
from loaderd.v1 import generation_pb2
from loaderd.v1.generation_pb2 import ChatMessage

_LENGTHS = ("max_completion_tokens", "max_tokens")


def read_chat(fields: Fields) -> Asked:
    """What a request asks for.

    Raises:
        LoaderdError: A field is wrong, or is not honoured.
    """
    given = [name for name in _LENGTHS if name in fields]
    if len(given) > 1:
        raise InvalidArgumentError("max_tokens", "does not go with max_completion_tokens")
    asked = read_common(fields, {"max_new_tokens": given[0] if given else _LENGTHS[0]})
    request = asked.request
    for name in _LENGTHS:
        fields.put(request, "max_new_tokens", name)
    fields.put(request, "logprobs", "logprobs")
    fields.put(request, "top_logprobs", "top_logprobs")
    if request.HasField("top_logprobs") and not request.logprobs:
        raise InvalidArgumentError("top_logprobs", "needs logprobs: true")
    fields.put(request, "chat_template_kwargs", "chat_template_kwargs")
    _check_format(fields.take("response_format", dict))
    messages = fields.need("messages", list)
    request.messages.messages.extend(
        _message(f"messages[{index}]", checked(f"messages[{index}]", each, dict))
        for index, each in enumerate(messages)
    )
    if not messages:
        raise InvalidArgumentError("messages", "must not be empty")
    fields.refuse_rest()
    return asked


def _check_format(wanted: dict[str, Any] | None) -> None:
    if wanted is not None and wanted != {"type": "text"}:
        raise UnsupportedOptionError("response_format", "only text is supported")


def _message(place: str, values: dict[str, Any]) -> ChatMessage:
    fields = Fields(values, within=place)
    role = fields.need("role", str)
    content = fields.take_any("content")
    fields.refuse_rest()
    # What OpenAI has called so since its newer models; templates know the older word.
    role = "system" if role == "developer" else role
    return ChatMessage(role=role, content=_content(f"{place}.content", content))


def _content(place: str, content: Any) -> str:
    """A message's text, which may come in parts."""
    if content is None:
        raise InvalidArgumentError(place, "is required")
    if isinstance(content, str):
        return content
    parts = []
    for index, part in enumerate(checked(place, content, list)):
        fields = Fields(checked(f"{place}[{index}]", part, dict), within=f"{place}[{index}]")
        if fields.need("type", str) != "text":
            raise UnsupportedOptionError(f"{place}[{index}].type", "only text is supported")
        parts.append(fields.need("text", str))
        fields.refuse_rest()
    return "".join(parts)


class ChatAnswer(Answer):
    """An answer of the assistant's."""

    id_prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Says who speaks."""
        return [_part(index, {"role": "assistant", "content": ""}) for index in range(count)]

    def delta(self, delta: generation_pb2.GenerationDelta) -> dict[str, Any]:
        """New text."""
        part = _part(delta.index, {"content": delta.text})
        if delta.logprobs:
            part["logprobs"] = _logprobs(delta.logprobs)
        return part

    def ending(self, index: int, finish: generation_pb2.Finish) -> dict[str, Any]:
        """The end."""
        return {**_part(index, {}), "finish_reason": finish_reason(finish)}

    def completion(self, completion: generation_pb2.Completion) -> dict[str, Any]:
        """A whole message."""
        return {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": _logprobs(completion.logprobs) if completion.logprobs else None,
            "finish_reason": finish_reason(completion.finish),
        }


def _part(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _logprobs(tokens: Iterable[generation_pb2.TokenLogprob]) -> dict[str, Any]:
    content = [
        {**_token(token), "top_logprobs": [_token(each) for each in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(token: generation_pb2.TokenLogprob | generation_pb2.TokenAlternative) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": token_bytes(token)}
