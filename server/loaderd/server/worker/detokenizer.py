"""Text from tokens that come one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6
"""Tokens of the prompt that the first token is decoded after."""
_MAX_PENDING = 8
"""Tokens that may wait for a whole character."""
_MAX_BYTES = 4
"""Of a character in UTF-8."""


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """The text of some tokens."""


class Detokenizer:
    """Detokenizes a growing list of tokens, at a cost per token that its length does not change.

    A token's text depends on what stands before it: byte-level tokenizers split a character
    over tokens, sentencepiece-like ones drop the space that begins a text. So each new token
    is decoded in a window that begins some tokens earlier, and what the window already showed
    is cut off. The window moves on when its text ends in a whole character. This is the method
    of prefix and read offsets that text-generation-inference (`decode_token`) and vLLM
    (`detokenize_incrementally`) use; here a run of tokens without a whole character, which
    stops their window, is cut at its last sure character.

    The texts joined are `decode` of all tokens, without the clean-up of spaces, which takes
    back characters that were shown.

    Args:
        tokenizer: Decodes.
        special_ids: Ids of special tokens when they are to be left out of the text, else empty.
        prompt: Tokens before the first one. Their text is not shown, but for that of the last
            ones when they leave a character unfinished.
    """

    def __init__(
        self, tokenizer: Decoder, special_ids: frozenset[int], prompt: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        # The tokenizer filters special tokens before it decodes; here they must not even be in
        # the window, where a run of them would push out what the next token is decoded after.
        context = [token for token in prompt if token not in special_ids]
        self._window, self._read = self._last_characters(context)
        self._prefix = self._decode(self._window[: self._read])

    def push(self, token_id: int) -> str:
        """Takes the next token.

        Returns:
            The text that became certain with it: whole characters, maybe none.
        """
        if token_id in self._special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text != self._prefix and not text.endswith(_REPLACEMENT):
            return self._show(text, held=0)
        if len(self._window) - self._read < _MAX_PENDING:
            return ""
        if text.endswith(_REPLACEMENT):
            return self._show(text, held=_held(text))
        # Tokens without any text: forget them, but not the one that begins the text.
        del self._window[max(self._read, 1) :]
        return ""

    def flush(self) -> str:
        """The text that was held back, now that no more comes."""
        text = self._decode(self._window)
        delta = text[len(self._prefix) :]
        self._prefix = text
        return delta

    def _show(self, text: str, *, held: int) -> str:
        delta = text[len(self._prefix) : len(text) - held]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        prefix = self._decode(self._window)
        self._prefix = prefix[: max(len(prefix) - held, 0)]
        return delta

    def _last_characters(self, token_ids: list[int]) -> tuple[list[int], int]:
        """The last tokens and how many of them end in a whole character.

        More of them are taken when they begin inside a character and that spoils the rest.
        """
        for more, unfinished in itertools.product(range(_MAX_BYTES), repeat=2):
            window = token_ids[-_CONTEXT - more :]
            read = max(len(window) - unfinished, 0)
            if not self._decode(window[:read]).endswith(_REPLACEMENT):
                return window, read
        return window, len(window)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _held(text: str) -> int:
    """How many characters at the end may be an unfinished one."""
    run = len(text) - len(text.rstrip(_REPLACEMENT))
    return min(run, _MAX_BYTES - 1)
