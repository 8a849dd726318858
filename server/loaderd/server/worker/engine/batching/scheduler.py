"""Who computes next. Pure: no torch, no clock, no threads."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

UNBOUNDED = 2**62
"""Tokens of memory whose bound is not known before a request fails for lack of it."""

_SECONDS_OF_CLASS = 5.0
"""A priority class ahead is worth this much waiting."""
_CLASSES = 20
"""Priorities beyond this many classes, up or down, count as this many, so that all get a turn."""
_SECONDS_OF_TOKEN = 0.001
"""What a token of one client delays that client's next request against others'."""
_MOST_SECONDS = 10.0
"""The most that one request delays them: it may be that few of its tokens are ever computed."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What can run at once.

    Attributes:
        slots: Most completions.
        slot_tokens: Most tokens of one completion, its prompt included.
        tokens: Most tokens of all completions together.
        queue: Most requests that wait.
    """

    slots: int
    slot_tokens: int
    tokens: int
    queue: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request, as far as scheduling goes.

    Attributes:
        key: Names it.
        client: Whose it is.
        priority: Higher goes first.
        arrived: Time of its arrival, in seconds.
        prompt_tokens: At least 1.
        new_tokens: The most that it may generate, for each completion.
        completions: At least 1.
    """

    key: int
    client: str
    priority: int
    arrived: float
    prompt_tokens: int
    new_tokens: int
    completions: int

    @property
    def line(self) -> tuple[str, int]:
        """The client, and the class of the priority: those of one line wait for each other."""
        return self.client, max(-_CLASSES, min(self.priority, _CLASSES))

    @property
    def charge(self) -> float:
        """Seconds that it delays the next one of its line."""
        return min(_SECONDS_OF_TOKEN * self.tokens, _MOST_SECONDS)

    @property
    def slot_tokens(self) -> int:
        """Of one completion."""
        return self.prompt_tokens + self.new_tokens

    @property
    def tokens(self) -> int:
        """Of all its completions."""
        return self.slot_tokens * self.completions


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt to compute in this step."""

    key: int
    count: int


@dataclass
class _Running:
    ticket: Ticket
    slots: list[int]
    computed: int = 0

    @property
    def left(self) -> int:
        return self.ticket.prompt_tokens - self.computed


@dataclass(order=True)
class _Waiting:
    due: float
    number: int
    ticket: Ticket = field(compare=False)


class Scheduler:
    """A queue, and the slots of what runs.

    The queue is ordered by one number that a request gets when it comes and keeps: the time from
    which it is its turn. That is its arrival, or later if its client has asked for much just
    before, and some seconds earlier or later by its priority. Whoever comes much later is behind
    it whatever his priority, so none starves. The first of the queue is never passed by one that
    needs less memory.

    What is admitted has all its slots and tokens, so that it never fails for lack of them.
    """

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._queue: list[_Waiting] = []
        self._running: dict[int, _Running] = {}
        self._free_slots = list(range(capacity.slots))
        self._free_tokens = capacity.tokens
        self._next_turn: dict[tuple[str, int], float] = {}
        self._submitted = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def reserved_tokens(self) -> int:
        """Tokens that running requests have memory for."""
        return self._capacity.tokens - self._free_tokens

    @property
    def is_full(self) -> bool:
        """Whether no more may wait."""
        return len(self._queue) >= self._capacity.queue

    def can_ever_run(self, ticket: Ticket) -> bool:
        """Whether it fits when nothing else runs."""
        capacity = self._capacity
        return (
            ticket.completions <= capacity.slots
            and ticket.slot_tokens <= capacity.slot_tokens
            and ticket.tokens <= capacity.tokens
        )

    def submit(self, ticket: Ticket) -> None:
        """Puts a request into the queue; it is not full, and the request can run some time."""
        line = ticket.line
        turn = max(ticket.arrived, self._next_turn.get(line, ticket.arrived))
        self._forget_idle_clients(ticket.arrived)
        self._next_turn[line] = turn + ticket.charge
        self._submitted += 1
        due = turn - _SECONDS_OF_CLASS * line[1]
        heapq.heappush(self._queue, _Waiting(due, self._submitted, ticket))

    def withdraw(self, key: int) -> bool:
        """Takes a request out of the queue, at no charge; false if it is not there."""
        for index, waiting in enumerate(self._queue):
            if waiting.ticket.key == key:
                del self._queue[index]
                heapq.heapify(self._queue)
                line = waiting.ticket.line
                if line in self._next_turn:
                    self._next_turn[line] -= waiting.ticket.charge
                return True
        return False

    def order(self) -> list[int]:
        """The keys of those who wait, the next one first."""
        return [waiting.ticket.key for waiting in sorted(self._queue)]

    def admit(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Moves requests whose turn it is from the queue to their slots.

        Yields:
            The key of each, and its slots, one a completion.
        """
        while self._queue:
            ticket = self._queue[0].ticket
            if ticket.completions > len(self._free_slots) or ticket.tokens > self._free_tokens:
                return
            heapq.heappop(self._queue)
            slots = [self._free_slots.pop(0) for _ in range(ticket.completions)]
            self._free_tokens -= ticket.tokens
            self._running[ticket.key] = _Running(ticket, slots)
            yield ticket.key, tuple(slots)

    def pieces(self, budget: int) -> list[Piece]:
        """What to compute of prompts in this step.

        Half goes to the prompt that was admitted first, so that it ends; the rest to the
        shortest ones, which then need not wait for it.

        Args:
            budget: Most tokens.
        """
        unfinished = [running for running in self._running.values() if running.left]
        if not unfinished:
            return []
        oldest = unfinished[0]
        counts = {oldest.ticket.key: min(oldest.left, (budget + 1) // 2)}
        budget -= counts[oldest.ticket.key]
        for running in sorted(unfinished, key=lambda running: running.left):
            key = running.ticket.key
            more = min(running.left - counts.get(key, 0), budget)
            if more > 0:
                counts[key] = counts.get(key, 0) + more
                budget -= more
        return [Piece(key, count) for key, count in counts.items()]

    def computed(self, key: int, tokens: int) -> None:
        """Notes how much of a prompt there is by now."""
        self._running[key].computed = tokens

    def release(self, key: int, slot: int) -> None:
        """Frees the slot of a completion that has ended; with its last one the request ends."""
        running = self._running[key]
        running.slots.remove(slot)
        insort(self._free_slots, slot)
        self._free_tokens += running.ticket.slot_tokens
        if not running.slots:
            del self._running[key]

    def end(self, key: int) -> None:
        """Frees all that a request still has, if anything."""
        if key in self._running:
            for slot in list(self._running[key].slots):
                self.release(key, slot)

    def move(self) -> tuple[int, int] | None:
        """Closes a hole between the slots in use, when nobody waits who would.

        Returns:
            The slot that is to be copied, and where to; None if there is no hole.
        """
        if self._queue or not self._running or not self._free_slots:
            return None
        owner, last = max(
            ((running, slot) for running in self._running.values() for slot in running.slots),
            key=lambda pair: pair[1],
        )
        hole = self._free_slots[0]
        if hole > last:
            return None
        owner.slots[owner.slots.index(last)] = self._free_slots.pop(0)
        insort(self._free_slots, last)
        return last, hole

    def _forget_idle_clients(self, now: float) -> None:
        for line in [line for line, turn in self._next_turn.items() if turn < now]:
            del self._next_turn[line]
