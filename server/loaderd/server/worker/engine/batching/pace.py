"""How much of prompts to compute in a step."""

from __future__ import annotations

_SMOOTHING = 0.2
_PATIENCE = 1.7
"""A step with prompts may take this much longer, in steps without, while others decode."""
_LEAST, _FIRST, _MOST = 16, 64, 512
_MOST_FREE = 2048
"""As much where tokens cost little beside the step itself, as on a GPU."""
_GROWTH = 2
"""Most tokens of a step, in those of the last ones, where what more would cost is a guess."""
_VARIETY = 0.1
"""Deviation of the tokens of steps, as a share of them, that tells what a step costs by itself."""
_FREE = 1e-9
"""Seconds; the least that a token takes."""


class Pace:
    """Sizes the pieces of prompts so that those who decode hardly notice.

    It measures what a step without prompts takes, what prompts add to one, and what each of their
    tokens adds. On a GPU steps without prompts are replayed and others are launched kernel by
    kernel: there most of what prompts add comes with the first token.
    """

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        self._added = _Line()

    def budget(self, decoding: int, prompts: int) -> int:
        """Tokens of prompts for the next step.

        Where more wait for their first token than decode, as after many came at once, the few
        wait for the many.

        Args:
            decoding: Requests that decode in it.
            prompts: Requests whose prompts are not computed yet.
        """
        step, token = self._costs()
        most = max(_MOST, min(int(step / token), _MOST_FREE))
        if not decoding:
            return most
        if not self._decode_seconds or not self._added.count:
            return _FIRST
        patience = _PATIENCE * max(prompts / decoding, 1)
        tokens = patience * step / token
        if self._added.is_varied:
            tokens = min(tokens, _GROWTH * max(self._added.x, _FIRST))
        return max(_LEAST, min(int(tokens), most))

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
        self._added.note(prompt_tokens, seconds)

    def _costs(self) -> tuple[float, float]:
        """Seconds of a step with prompts without their tokens, and of each of these."""
        decode, added = self._decode_seconds or 0.0, self._added
        mean = added.y / max(added.x, 1) + _FREE
        if added.is_varied:
            token = min(max(added.slope, _FREE), mean)
            first = added.y - token * added.x
            # Less is within what a step may take longer, and may be an error of measurement.
            if first > _PATIENCE * decode:
                return decode + first, token
        return decode, mean


class _Line:
    """A straight line through points, of which the last ones count most.

    Attributes:
        count: Points so far.
        x: Their mean, and `y`.
    """

    def __init__(self) -> None:
        self.count = 0
        self.x = self.y = 0.0
        self._variance = self._covariance = 0.0

    @property
    def is_varied(self) -> bool:
        """Whether there are points apart, so that they tell a slope."""
        return self._variance > (_VARIETY * self.x) ** 2

    @property
    def slope(self) -> float:
        """How much `y` grows with `x`."""
        return self._covariance / self._variance

    def note(self, x: float, y: float) -> None:
        """Takes up a point."""
        self.count += 1
        weight = max(_SMOOTHING, 1 / self.count)
        dx, dy = x - self.x, y - self.y
        self.x += weight * dx
        self.y += weight * dy
        self._variance = (1 - weight) * (self._variance + weight * dx * dx)
        self._covariance = (1 - weight) * (self._covariance + weight * dx * dy)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
