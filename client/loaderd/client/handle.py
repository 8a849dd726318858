"""What both model handles know and build without asking the daemon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loaderd.client.parameters import GenerationParameters
from loaderd.client.requests import (
    ChatMessages,
    GenerationRequest,
    apply_chat_template_request,
    detokenize_request,
    generation_request,
    tokenize_request,
)
from loaderd.client.types import ModelDetails, ModelInfo, ModelState
from loaderd.v1 import generation_pb2


class ModelHandle:
    """Base of `Model` and `AsyncModel`. All calls of a handle name the model by its id.

    Args:
        info: What the daemon told.
        lease_id: A lease that requests for text name unless they name another.
    """

    def __init__(self, info: ModelInfo, lease_id: str | None = None) -> None:
        self._info = info
        self._lease_id = lease_id

    @property
    def info(self) -> ModelInfo:
        """What the daemon last told this handle about the model; `refresh` asks again."""
        return self._info

    @property
    def id(self) -> str:
        """The model's id."""
        return self._info.id

    @property
    def name(self) -> str:
        """The name that it was loaded by."""
        return self._info.name

    @property
    def state(self) -> ModelState:
        """Where it was in its life when the daemon last told."""
        return self._info.state

    @property
    def details(self) -> ModelDetails | None:
        """What its worker found; None before it was READY."""
        return self._info.details

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, id={self.id!r}, state={self.state.name})"

    def _generation_request(
        self,
        kind: type[GenerationRequest],
        text: str | None,
        messages: ChatMessages | None,
        token_ids: Sequence[int] | None,
        parameters: GenerationParameters,
    ) -> GenerationRequest:
        if self._lease_id is not None and parameters.get("lease_id") is None:
            parameters = {**parameters, "lease_id": self._lease_id}
        return generation_request(
            kind,
            self.id,
            text=text,
            messages=messages,
            token_ids=token_ids,
            parameters=parameters,
        )

    def _tokenize_request(
        self,
        text: str | None,
        messages: ChatMessages | None,
        add_special_tokens: bool | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> generation_pb2.TokenizeRequest:
        return tokenize_request(
            self.id,
            text=text,
            messages=messages,
            add_special_tokens=add_special_tokens,
            chat_template_kwargs=chat_template_kwargs,
        )

    def _detokenize_request(
        self, token_ids: Sequence[int], skip_special_tokens: bool | None
    ) -> generation_pb2.DetokenizeRequest:
        return detokenize_request(self.id, token_ids, skip_special_tokens)

    def _apply_chat_template_request(
        self,
        messages: ChatMessages,
        add_generation_prompt: bool | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> generation_pb2.ApplyChatTemplateRequest:
        return apply_chat_template_request(
            self.id,
            messages,
            add_generation_prompt=add_generation_prompt,
            chat_template_kwargs=chat_template_kwargs,
        )
