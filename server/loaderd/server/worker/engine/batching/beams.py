"""Which outputs a beam search goes on with, and which it ends up with. Pure: no torch, no clock.

The same as transformers' beam search of one prompt, but for which of equal scores goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from loaderd.server.worker.engine.protocol import Beams, Stopping

PlaceT = TypeVar("PlaceT")


@dataclass(frozen=True, slots=True)
class Beam:
    """An output that goes on, or one that has ended.

    Attributes:
        token_ids: Without the prompt.
        score: Log probability of all its tokens; of an output that has ended, over its length to
            the power of the length penalty.
    """

    token_ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A beam and a token that may follow it.

    Attributes:
        parent: Place of the beam among those that run.
        token_id: The token.
        score: Log probability of the beam with this token.
    """

    parent: int
    token_id: int
    score: float


class BeamSearch:
    """The outputs of one prompt.

    Each step offers the most probable tokens after any beam. Of those that end an output, the ones
    among the first `count` are noted, so that one ends only if it is better than what goes on;
    the first `count` of the others are the beams of the next step.

    Args:
        beams: How to search.
        stopping: What ends an output; stop strings and times do not.

    Attributes:
        running: The beams that go on, best first; at first one that is empty.
        ended: The best outputs that have ended, best first; at most `count`.
        is_over: Whether it has ended: `ended` is the result.
    """

    def __init__(self, beams: Beams, stopping: Stopping) -> None:
        self.running: list[Beam] = [Beam((), 0.0)]
        self.ended: list[Beam] = []
        self.is_over = False
        self._beams = beams
        self._stopping = stopping
        self._stops = frozenset((*stopping.eos_token_ids, *stopping.stop_token_ids))

    @property
    def wanted(self) -> int:
        """Candidates that a step needs: even if all that can end do, enough are left to go on."""
        return self._beams.count * (1 + max(len(self._stops), 1))

    def advance(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """One step.

        Args:
            candidates: The best ones, best first; fewer than `wanted` only if there are no more.

        Returns:
            Those that are the running beams now.
        """
        count, length = self._beams.count, len(self.running[0].token_ids) + 1
        full = length == self._stopping.max_new_tokens
        stops = self._stops if length >= self._stopping.min_new_tokens else frozenset()
        ending = [one for one in candidates[:count] if full or one.token_id in stops]
        chosen = [one for one in candidates if not full and one.token_id not in stops][:count]
        self._end([self._extended(candidate) for candidate in ending])
        self.running = [self._extended(candidate) for candidate in chosen]
        self.is_over = not self.running or (len(self.ended) == count and not self._can_improve())
        return chosen

    def cut(self) -> None:
        """Ends it here, if it is not over: what runs counts as if it had ended."""
        if not self.is_over:
            self._end([beam for beam in self.running if beam.token_ids])
        self.is_over = True

    def _extended(self, candidate: Candidate) -> Beam:
        parent = self.running[candidate.parent]
        return Beam((*parent.token_ids, candidate.token_id), candidate.score)

    def _end(self, beams: Sequence[Beam]) -> None:
        self.ended += [Beam(beam.token_ids, self._penalized(beam)) for beam in beams]
        self.ended.sort(key=lambda beam: -beam.score)
        del self.ended[self._beams.count :]

    def _can_improve(self) -> bool:
        """Whether the best beam, as it is, beats the last of those that have ended."""
        if self._beams.early_stopping:
            return False
        return self._penalized(self.running[0]) > self.ended[-1].score

    def _penalized(self, beam: Beam) -> float:
        return float(beam.score / len(beam.token_ids) ** self._beams.length_penalty)


def placed(parents: Sequence[PlaceT], places: Sequence[PlaceT]) -> list[PlaceT]:
    """Where the beams of the next step go, so that none that is needed is lost.

    The first of a parent's beams stays where the parent is, the others go where none stays. So no
    place is both copied from and written to, and the order of the copies does not matter.

    Args:
        parents: The place of each beam's parent.
        places: All there are, each once; at least as many as beams.

    Returns:
        The place of each beam.
    """
    free = iter([place for place in places if place not in parents])
    return [
        parent if parent not in parents[:beam] else next(free)
        for beam, parent in enumerate(parents)
    ]
