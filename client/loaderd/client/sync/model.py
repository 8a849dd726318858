"""The handle of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from loaderd.client import responses
from loaderd.client.handle import ModelHandle
from loaderd.client.parameters import GenerationParameters, Seconds
from loaderd.client.requests import ChatMessages, lease_request, unload_request
from loaderd.client.sync.lease import Lease
from loaderd.client.sync.stream import GenerationStream
from loaderd.client.sync.transport import Transport
from loaderd.client.types import (
    GenerationResult,
    ModelInfo,
    RenderedPrompt,
    Tokenization,
    UnloadResult,
)
from loaderd.v1 import generation_pb2, model_pb2


class Model(ModelHandle):
    """A model that the daemon holds. Made by `Client.load`, `.model` and `.models`.

    Calls after the model was unloaded raise `ModelNotLoadedError`.
    """

    def __init__(self, transport: Transport, info: ModelInfo, lease_id: str | None = None) -> None:
        super().__init__(info, lease_id)
        self._transport = transport

    def generate(
        self,
        text: str | None = None,
        *,
        messages: ChatMessages | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **parameters: Unpack[GenerationParameters],
    ) -> GenerationResult:
        """Generates and returns everything at once. Give exactly one input.

        Args:
            text: A text to continue.
            messages: A chat to answer, rendered by the model's chat template.
            token_ids: Ready token ids to continue.
            timeout: Seconds; None: as long as it takes. `max_time` ends the generation in time
                and keeps what there is; this gives it up.
            **parameters: See `GenerationParameters`.

        Raises:
            TypeError: A parameter does not exist or has the wrong type.
            LoaderdError: See `errors`; for example `UnsupportedOptionError`.
        """
        request = self._generation_request(
            generation_pb2.GenerateRequest, text, messages, token_ids, parameters
        )
        return responses.generation_result(self._transport.generate(request, timeout))

    def stream(
        self,
        text: str | None = None,
        *,
        messages: ChatMessages | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **parameters: Unpack[GenerationParameters],
    ) -> GenerationStream:
        """Generates and yields text as it comes. Takes what `generate` takes.

        Stopping to iterate cancels the computation.

        Raises:
            TypeError: A parameter does not exist or has the wrong type.
            LoaderdError: As `generate`, from this call or while iterating.
        """
        request = self._generation_request(
            generation_pb2.StreamGenerateRequest, text, messages, token_ids, parameters
        )
        return GenerationStream(
            self._transport.stream(
                self._transport.stubs.generation.StreamGenerate, request, timeout
            )
        )

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: ChatMessages | None = None,
        add_special_tokens: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Tokenization:
        """Token ids of a text, or of a chat as the chat template renders it."""
        request = self._tokenize_request(text, messages, add_special_tokens, chat_template_kwargs)
        return responses.tokenization(
            self._transport.call(self._transport.stubs.generation.Tokenize, request, timeout)
        )

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids. Special tokens stay in it unless they are to be skipped."""
        request = self._detokenize_request(token_ids, skip_special_tokens)
        response = self._transport.call(
            self._transport.stubs.generation.Detokenize, request, timeout
        )
        return response.text

    def apply_chat_template(
        self,
        messages: ChatMessages,
        *,
        add_generation_prompt: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> RenderedPrompt:
        """The prompt that the model's chat template makes of messages.

        Args:
            messages: The chat, oldest first.
            add_generation_prompt: Whether it ends with what opens the assistant's turn. Default
                true.
            chat_template_kwargs: See `GenerationParameters`.
            timeout: Seconds; None: the client's default.

        Raises:
            UnsupportedOptionError: The model has no chat template, or it does not read one of
                `chat_template_kwargs`.
        """
        request = self._apply_chat_template_request(
            messages, add_generation_prompt, chat_template_kwargs
        )
        return responses.rendered_prompt(
            self._transport.call(
                self._transport.stubs.generation.ApplyChatTemplate, request, timeout
            )
        )

    def refresh(self, *, timeout: float | None = None) -> ModelInfo:
        """Asks the daemon about the model again; updates and returns `info`.

        Raises:
            ModelNotLoadedError: It is gone.
        """
        request = model_pb2.GetModelRequest(model=self.id)
        response = self._transport.call(self._transport.stubs.models.GetModel, request, timeout)
        self._info = responses.model_info(response.model)
        return self._info

    def lease(self, ttl: Seconds, *, timeout: float | None = None) -> Lease:
        """Holds the model between calls.

        Args:
            ttl: How long the lease lives after its last renewal, from a second to a day.
            timeout: Seconds; None: the client's default.

        Raises:
            ModelNotLoadedError: It is not READY.
        """
        response = self._transport.call(
            self._transport.stubs.models.AcquireLease, lease_request(self.id, ttl), timeout
        )
        info = responses.lease(response.lease)
        return Lease(self._transport, info, Model(self._transport, self.info, info.id))

    def unload(
        self,
        *,
        force: bool = False,
        grace: Seconds | None = None,
        timeout: float | None = None,
    ) -> UnloadResult:
        """Ends the model's process and gives its memory back.

        Args:
            force: End requests that run on it and leases, rather than refuse.
            grace: How long running requests may go on before `force` ends them; new ones are
                refused at once. None: not at all.
            timeout: Seconds; None: the client's default and the grace.

        Raises:
            ModelInUseError: Requests run on it or leases hold it, and `force` is false.
            ModelNotLoadedError: It is gone already.
        """
        request = unload_request(self.id, force=force, grace=grace)
        response = self._transport.call(
            self._transport.stubs.models.UnloadModel,
            request,
            timeout,
            grace_s=request.grace.ToTimedelta().total_seconds(),
        )
        result = responses.unload_result(response)
        self._info = result.model
        return result
