"""How much of prompts to compute in a step."""

from __future__ import annotations

from itertools import pairwise

_SMOOTHING = 0.2
_STRETCH = 1.9
"""A step with prompts may take so many times what one takes when all of them decode."""
_LEAST, _FIRST, _MOST = 16, 64, 512
_MOST_FREE = 2048
"""As much where tokens cost little beside the step itself, as on a GPU."""
_GROWTH = 2
"""Most tokens of a step, in those of the last ones, where what more would cost is a guess."""
_VARIETY = 0.1
"""Deviation of the tokens of steps, as a share of them, that tells what a step costs by itself."""
_CHANGED = 3
"""Tokens that take so many times less than before are measured anew: the box was busy then, or the
copies of weights were not made yet."""
_FREE = 1e-9
"""Seconds; the least that a token takes."""


class Pace:
    """Sizes the pieces of prompts so that those who decode hardly notice.

    It measures what a step without prompts takes, what prompts add to one, and what each of their
    tokens adds. On a GPU steps without prompts are replayed and others are launched kernel by
    kernel: there most of what prompts add comes with the first token.
    """

    def __init__(self) -> None:
        self._decode = _DecodeTimes()
        self._added = _Line()

    def budget(self, decoding: int, prompts: int) -> int:
        """Tokens of prompts for the next step.

        After many came at once few decode, and soon all will: a step may take as long as it will
        take then, and some more. Where more wait for their first token than decode, the few wait
        for the many.

        Args:
            decoding: Completions that decode in it.
            prompts: Requests whose prompts are not computed yet.
        """
        first, token = self._costs(decoding)
        decode = self._decode_seconds(max(decoding, 1))
        most = max(_MOST, min(int((decode + first) / token), _MOST_FREE))
        if not decoding:
            return most
        if not decode or not self._added.count:
            return _FIRST
        seconds = _STRETCH * (self._decode_seconds(decoding + prompts) + first) - decode
        tokens = seconds * max(prompts / decoding, 1) / token
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
        if prompt_tokens:
            decode = self._decode_seconds(decoding)
            added = max(seconds - decode, 0.0)
            if _CHANGED * added < self._mean * prompt_tokens:
                self._added = _Line()
            self._added.note(prompt_tokens, added)
        else:
            self._decode.note(decoding, seconds)

    @property
    def _mean(self) -> float:
        """Seconds that prompts added to steps, by their tokens."""
        return self._added.y / max(self._added.x, 1) + _FREE

    def _decode_seconds(self, decoding: int) -> float:
        """What a step without prompts takes; one token more is one whoever it is of."""
        return self._decode.seconds(decoding, self._mean)

    def _costs(self, decoding: int) -> tuple[float, float]:
        """Seconds that prompts add to a step before their tokens, and of each of these."""
        added, mean = self._added, self._mean
        if added.is_varied:
            token = min(max(added.slope, _FREE), mean)
            first = added.y - token * added.x
            # Less is within what a step may take longer, and may be an error of measurement.
            if first > _STRETCH * self._decode_seconds(decoding):
                return first, token
        return 0.0, mean


class _DecodeTimes:
    """What steps without prompts take, by how many decode in them.

    They are kept for each power of two by itself: while many prompts are computed there are none
    of these steps, and the last ones before may have been those of few.
    """

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, float]] = {}

    def note(self, decoding: int, seconds: float) -> None:
        """Takes up a step."""
        size = decoding.bit_length()
        x, y = self._points.get(size, (decoding, seconds))
        self._points[size] = (
            x + _SMOOTHING * (decoding - x),
            y + _SMOOTHING * (seconds - y),
        )

    def seconds(self, decoding: int, token: float) -> float:
        """On the straight line between what was measured next to it; 0 for no idea.

        Args:
            decoding: Completions.
            token: Seconds that each of more than were ever measured adds.
        """
        if not decoding or not self._points:
            return 0.0
        points = [self._points[size] for size in sorted(self._points)]
        for (x0, y0), (x1, y1) in pairwise(points):
            if x0 <= decoding <= x1:
                return y0 + (y1 - y0) * (decoding - x0) / (x1 - x0)
        x, y = points[-1]
        return points[0][1] if decoding < x else y + token * (decoding - x)


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
