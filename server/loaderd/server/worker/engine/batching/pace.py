"""How much of prompts to compute in a step."""

from __future__ import annotations

_SMOOTHING = 0.2
_PATIENCE = 1.7
"""A step with prompts may take this much longer, in steps without, while others decode."""
_LEAST, _FIRST, _MOST = 16, 64, 512


class Pace:
    """Sizes the pieces of prompts so that those who decode hardly notice.

    It measures: what a step without prompts takes, and what a prompt's token adds to one.
    """

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        self._token_seconds: float | None = None

    def budget(self, decoding: int, prompts: int) -> int:
        """Tokens of prompts for the next step.

        Where more wait for their first token than decode, as after many came at once, the few
        wait for the many.

        Args:
            decoding: Requests that decode in it.
            prompts: Requests whose prompts are not computed yet.
        """
        if not decoding:
            return _MOST
        if not self._decode_seconds or not self._token_seconds:
            return _FIRST
        patience = _PATIENCE * max(prompts / decoding, 1)
        tokens = int(patience * self._decode_seconds / self._token_seconds)
        return max(_LEAST, min(tokens, _MOST))

    def note(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Learns from a step.

        Args:
            decoding: Completions that decoded in it.
            prompt_tokens: Tokens of prompts in it.
            seconds: What it took.
        """
        if not prompt_tokens:
            self._decode_seconds = _smoothed(self._decode_seconds, seconds)
            return
        if decoding:
            seconds = max(seconds - (self._decode_seconds or 0.0), 0.0)
        self._token_seconds = _smoothed(self._token_seconds, seconds / prompt_tokens)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
