"""Text, messages and token ids of the loaded model, into each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from loaderd.server.errors import InvalidArgumentError
from loaderd.server.worker.chat_template import render
from loaderd.v1 import generation_pb2
from loaderd.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Request: TypeAlias = generation_pb2.StreamGenerateRequest | generation_pb2.TokenizeRequest

_ONLY_WITH_TEXT = "goes with text only"
_ONLY_WITH_MESSAGES = "goes with messages only"


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that decoding leaves out when special tokens are to be left out."""
    added = tokenizer.added_tokens_decoder
    return frozenset(token_id for token_id, token in added.items() if token.special)


class Tokenization:
    """Encodes prompts and answers tokenizer calls.

    Args:
        tokenizer: Of the loaded model.
        vocabulary_size: Token ids are below it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size

    def prompt(self, request: generation_pb2.StreamGenerateRequest) -> list[int]:
        """The request's input as token ids, not yet checked against the vocabulary.

        Raises:
            InvalidArgumentError: The input is missing or malformed.
            UnsupportedOptionError: Messages, and the model has no chat template, or none that
                reads what the request gives it.
        """
        if request.WhichOneof("input") == "token_ids":
            _check_no_variables(request)
            if request.HasField("add_special_tokens"):
                raise InvalidArgumentError("add_special_tokens", _ONLY_WITH_TEXT)
            return list(request.token_ids.ids)
        return self._encode_input(request)

    def bad_words(self, request: generation_pb2.StreamGenerateRequest) -> list[list[int]]:
        """The bad words as token ids: as they begin a text, and as they follow a space."""
        texts = [text for word in request.bad_words for text in (word, f" {word}")]
        encoded = (tuple(self._encode(text, add_special_tokens=False)) for text in texts)
        return [list(token_ids) for token_ids in dict.fromkeys(encoded) if token_ids]

    def answer(self, call: worker_pb2.Call) -> worker_pb2.Reply:
        """Does the call's work.

        Raises:
            InvalidArgumentError: The request is malformed.
            UnsupportedOptionError: Messages, and the model has no chat template, or none that
                reads what the request gives it.
        """
        match call.WhichOneof("request"):
            case "tokenize":
                return worker_pb2.Reply(tokenize=self._tokenize(call.tokenize))
            case "detokenize":
                return worker_pb2.Reply(detokenize=self._detokenize(call.detokenize))
            case "apply_chat_template":
                rendered = self._apply_chat_template(call.apply_chat_template)
                return worker_pb2.Reply(apply_chat_template=rendered)
        raise InvalidArgumentError("request", "the worker does not know this call")

    def _tokenize(self, request: generation_pb2.TokenizeRequest) -> generation_pb2.TokenizeResponse:
        token_ids = self._encode_input(request)
        tokens = self._tokenizer.convert_ids_to_tokens(token_ids)
        return generation_pb2.TokenizeResponse(token_ids=token_ids, tokens=tokens)

    def _detokenize(
        self, request: generation_pb2.DetokenizeRequest
    ) -> generation_pb2.DetokenizeResponse:
        highest = max(request.token_ids, default=0)
        if highest >= self._vocabulary_size:
            raise InvalidArgumentError(
                "token_ids",
                f"token id {highest} is not below the vocabulary's size of {self._vocabulary_size}",
            )
        text = self._tokenizer.decode(
            list(request.token_ids),
            skip_special_tokens=request.skip_special_tokens,
            clean_up_tokenization_spaces=False,  # as generated text
        )
        return generation_pb2.DetokenizeResponse(text=text)

    def _apply_chat_template(
        self, request: generation_pb2.ApplyChatTemplateRequest
    ) -> generation_pb2.ApplyChatTemplateResponse:
        with_prompt = not request.HasField("add_generation_prompt") or request.add_generation_prompt
        text = render(
            self._tokenizer,
            request.messages,
            add_generation_prompt=with_prompt,
            variables=request.chat_template_kwargs,
        )
        token_ids = self._encode(text, add_special_tokens=False)
        return generation_pb2.ApplyChatTemplateResponse(text=text, token_ids=token_ids)

    def _encode_input(self, request: _Request) -> list[int]:
        match request.WhichOneof("input"):
            case "text":
                _check_no_variables(request)
                special = not request.HasField("add_special_tokens") or request.add_special_tokens
                return self._encode(request.text, add_special_tokens=special)
            case "messages":
                if request.HasField("add_special_tokens"):
                    raise InvalidArgumentError("add_special_tokens", _ONLY_WITH_TEXT)
                return self._encode_chat(request)
        raise InvalidArgumentError("input", "is missing; give exactly one")

    def _encode_chat(self, request: _Request) -> list[int]:
        text = render(
            self._tokenizer,
            request.messages.messages,
            add_generation_prompt=True,
            variables=request.chat_template_kwargs,
        )
        return self._encode(text, add_special_tokens=False)  # the template writes them

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return token_ids


def _check_no_variables(request: _Request) -> None:
    if request.HasField("chat_template_kwargs"):
        raise InvalidArgumentError("chat_template_kwargs", _ONLY_WITH_MESSAGES)
