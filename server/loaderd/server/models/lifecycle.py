"""The states of a model and the only ways from one to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum


class ModelState(Enum):
    """Where a model is in its life."""

    RESOLVING = "resolving"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"
    FAILED = "failed"

    @property
    def is_loading(self) -> bool:
        """Whether a load is under way."""
        return self in _LOADING

    @property
    def is_held(self) -> bool:
        """Whether the model takes, or soon takes, a worker's memory."""
        return self in _LOADING or self in {ModelState.READY, ModelState.UNLOADING}


_LOADING = frozenset({ModelState.RESOLVING, ModelState.DOWNLOADING, ModelState.LOADING})

TRANSITIONS: dict[ModelState, frozenset[ModelState]] = {
    ModelState.RESOLVING: frozenset(
        {
            ModelState.DOWNLOADING,
            ModelState.LOADING,
            ModelState.UNLOADED,
            ModelState.FAILED,
        }
    ),
    ModelState.DOWNLOADING: frozenset({ModelState.LOADING, ModelState.UNLOADED, ModelState.FAILED}),
    ModelState.LOADING: frozenset({ModelState.READY, ModelState.UNLOADED, ModelState.FAILED}),
    ModelState.READY: frozenset({ModelState.UNLOADING, ModelState.FAILED}),
    ModelState.UNLOADING: frozenset({ModelState.UNLOADED, ModelState.FAILED}),
    ModelState.FAILED: frozenset({ModelState.LOADING, ModelState.UNLOADED}),
    ModelState.UNLOADED: frozenset(),
}
"""From each state, the states that may follow. A load that is cancelled goes to UNLOADED, as does a
failed model that is removed; one that is loaded again goes to LOADING."""


class TransitionError(Exception):
    """A defect: a transition that the table does not have."""


class ChangeReason(Enum):
    """Why a model changed its state."""

    LOAD = "load"
    UNLOAD = "unload"
    IDLE = "idle"
    EVICTED = "evicted"
    FAILURE = "failure"
    FORGOTTEN = "forgotten"
    SHUTDOWN = "shutdown"
    REPLICAS = "replicas"
    WORKER_DIED = "worker_died"


@dataclass
class Lifecycle:
    """The state of one model and when it entered each state.

    Attributes:
        clock: Monotonic seconds.
        entered: For each state entered so far, the monotonic time of the last entry.
        previous_s: Seconds that it was in the state before this one; None in its first state.
    """

    clock: Callable[[], float]
    state: ModelState = ModelState.RESOLVING
    entered: dict[ModelState, float] = field(init=False)
    previous_s: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.entered = {self.state: self.clock()}

    def to(self, state: ModelState) -> ModelState:
        """Enters `state` and returns the one that it left.

        Raises:
            TransitionError: The table has no such transition.
        """
        if state not in TRANSITIONS[self.state]:
            raise TransitionError(f"{self.state.value} -> {state.value}")
        now, previous, self.state = self.clock(), self.state, state
        self.previous_s = now - self.entered[previous]
        if previous is ModelState.FAILED and state.is_loading:
            self.entered = {ModelState.RESOLVING: now}  # it begins anew
        self.entered[state] = now
        return previous

    def between(self, start: ModelState, *ends: ModelState) -> float | None:
        """Seconds from entering `start` to entering the first of `ends` that was entered."""
        for end in ends:
            if start in self.entered and end in self.entered:
                return self.entered[end] - self.entered[start]
        return None
