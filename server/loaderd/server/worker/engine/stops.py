"""Stop strings, found in text that comes piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string in a stream of text, also across its pieces.

    The first is the one that is complete first; of several that are complete at one character,
    the longest. So the result does not depend on how the text is cut into pieces.

    Args:
        stops: The strings; none empty.
        include: Whether the text keeps the string that was found.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece.

        Returns:
            Text that is certain by now, and the stop string that ends it, if one came. What a
            stop string may still grow of is held back.
        """
        text = self._held + text
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, stop = min(found, key=lambda match: (match[0], -len(match[1])))
            return text[: end if self._include else end - len(stop)], stop
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text that was held back, now that no more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
