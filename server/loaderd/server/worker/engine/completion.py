"""One completion in the making: tokens in, text and finally the reason of its end out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loaderd.server.worker.detokenizer import Decoder, Detokenizer
from loaderd.server.worker.engine.protocol import GenerationRequest, SampledToken
from loaderd.server.worker.engine.stops import StopStrings
from loaderd.v1 import generation_pb2
from loaderd.v1.generation_pb2 import Finish, FinishReason, TokenAlternative, TokenLogprob


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What completions need of the model's tokenizer.

    Attributes:
        decoder: Decodes token ids.
        special_ids: Ids of its special tokens.
    """

    decoder: Decoder
    special_ids: frozenset[int]
    _texts: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def logprobs(self, tokens: Sequence[SampledToken]) -> list[TokenLogprob]:
        """Log probabilities as clients get them; none for tokens that have none."""
        return [
            TokenLogprob(
                token_id=token.token_id,
                text=self._text(token.token_id),
                logprob=token.logprob,
                top=[
                    TokenAlternative(token_id=token_id, text=self._text(token_id), logprob=logprob)
                    for token_id, logprob in token.top
                ],
            )
            for token in tokens
            if token.logprob is not None
        ]

    def _text(self, token_id: int) -> str:
        """The text of a token alone. At most the vocabulary's are remembered."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decoder.decode(
                [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return text


class Completion:
    """Applies a request's stops and output options to the tokens that come.

    It knows nothing of models and clocks, so that every engine can use it: the engine pushes
    each token, ends when `finish` is set, and calls `close` when it stops for a reason of its own.

    Attributes:
        finish: Why it ended; None while it goes on.
        generated_tokens: Tokens so far, those that ended it included.
    """

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.finish: Finish | None = None
        self.generated_tokens = 0
        self._request = request
        self._tokenizer = tokenizer
        special_ids = tokenizer.special_ids if request.skip_special_tokens else frozenset()
        self._text = Detokenizer(tokenizer.decoder, special_ids, request.prompt)
        stopping = request.stopping
        self._stops = StopStrings(stopping.stop_strings, include=stopping.include_stop_string)

    def echo(self) -> generation_pb2.GenerationDelta | None:
        """The prompt's text, when the request wants the text to begin with it."""
        if not self._request.echo:
            return None
        text = self._tokenizer.decoder.decode(
            list(self._request.prompt),
            skip_special_tokens=self._request.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return generation_pb2.GenerationDelta(text=text)

    def push(self, token: SampledToken) -> generation_pb2.GenerationDelta | None:
        """Takes the next token; sets `finish` if it is the last one.

        Returns:
            What the client gets to see of it; None for nothing.
        """
        stopping, token_id = self._request.stopping, token.token_id
        self.generated_tokens += 1
        enough = self.generated_tokens >= stopping.min_new_tokens
        ended = self._end_of(token_id) if enough else None
        shown = "" if ended and self._request.skip_special_tokens else self._text.push(token_id)
        if ended is None and self.generated_tokens == stopping.max_new_tokens:
            ended = Finish(reason=FinishReason.FINISH_REASON_LENGTH)
        if ended is not None:
            text = self._last_text(shown, ended)
        elif enough:
            text = self._up_to_stop(shown)
        else:
            text = shown
        return self._delta(text, [token])

    def close(self, reason: FinishReason.ValueType) -> generation_pb2.GenerationDelta | None:
        """Ends it after the tokens so far.

        Returns:
            The text that was held back; None for nothing.
        """
        return self._delta(self._last_text("", Finish(reason=reason)), [])

    def _end_of(self, token_id: int) -> Finish | None:
        stopping, stop = self._request.stopping, FinishReason.FINISH_REASON_STOP
        if token_id in stopping.eos_token_ids:
            return Finish(reason=stop, eos_token_id=token_id)
        if token_id in stopping.stop_token_ids:
            return Finish(reason=stop, stop_token_id=token_id)
        return None

    def _last_text(self, shown: str, ended: Finish) -> str:
        text = self._up_to_stop(shown + self._text.flush())
        if self.finish is None:
            self.finish = ended
            text += self._stops.flush()
        return text

    def _up_to_stop(self, text: str) -> str:
        text, stop = self._stops.push(text)
        if stop is not None:
            self.finish = Finish(reason=FinishReason.FINISH_REASON_STOP, stop_string=stop)
        return text

    def _delta(
        self, text: str, tokens: Sequence[SampledToken]
    ) -> generation_pb2.GenerationDelta | None:
        request = self._request
        token_ids = [token.token_id for token in tokens] if request.return_token_ids else []
        logprobs = self._tokenizer.logprobs(tokens) if request.top_logprobs is not None else []
        if not (text or token_ids or logprobs):
            return None
        return generation_pb2.GenerationDelta(text=text, token_ids=token_ids, logprobs=logprobs)
