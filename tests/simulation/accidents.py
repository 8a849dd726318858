"""What happens to a simulated box in a long run: drawn at random, the same again for a seed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.simulation.simulation import LONGEST_GRACE_S, Simulation
from tests.simulation.store import NAMES
from tests.simulation.workers import Fate

_DEVICE_MAPS = (None, None, None, "balanced", "sequential", "cpu", "cuda:0", "cuda:1", "mps")
_KEEP_ALIVES = (None, None, None, 0, 0, 0.001, 1, 30, 300, -1)
_TTLS = (None, None, None, 1, 10, 100)
_MOSTLY = 12 * (Fate.WELL,)
_THERE = 0.7
"""How often clients name a model that is there."""
_COUNTS = (0, 1, 1, 5, 50, 1000)


class Accidents:
    """Acts on a simulation at random.

    Args:
        simulation: The box.
        seed: Of what happens.
    """

    def __init__(self, simulation: Simulation, seed: int) -> None:
        self._box = simulation
        self._random = Random(seed)
        self._actions: dict[Callable[[], None], float] = {
            self._load: 20,
            self._generate: 30,
            self._cancel: 10,
            self._unload: 8,
            self._force: 4,
            self._acquire: 6,
            self._renew: 4,
            self._release: 3,
            self._expire: 10,
            self._crash: 2,
            self._hang: 1,
            self._fate: 2,
            self._hub: 1,
            self._kernel: 1,
            self._delete: 1,
            self._restart: 0.5,
        }

    def happen(self) -> None:
        """One thing happens, and some time passes.

        Raises:
            AssertionError: Something is wrong.
        """
        (action,) = self._random.choices(list(self._actions), list(self._actions.values()))
        action()
        self._box.step(self._random.choice((0, 0, 0, 0.05, 0.5, 2, 10)))

    def _model(self) -> str:
        """Of those that are there, or of all."""
        models = self._box.models if self._random.random() < _THERE else []
        return self._random.choice(models or NAMES)

    def _load(self) -> None:
        choose = self._random.choice
        self._box.clients.load(
            choose(NAMES), choose(_DEVICE_MAPS), choose(_KEEP_ALIVES), choose(_TTLS)
        )

    def _generate(self) -> None:
        leases = self._box.leases if self._random.random() < 0.3 else []
        self._box.clients.generate(
            self._model(),
            self._random.choice(_COUNTS),
            self._random.choice(_KEEP_ALIVES),
            self._random.choice(leases) if leases else None,
        )

    def _cancel(self) -> None:
        if self._box.clients.running:
            self._box.clients.cancel(self._random.randrange(100))

    def _unload(self) -> None:
        self._box.clients.unload(self._model(), force=False)

    def _force(self) -> None:
        grace = self._random.choice((0, 0, 1, 30, LONGEST_GRACE_S))
        self._box.clients.unload(self._model(), force=True, grace=grace)

    def _acquire(self) -> None:
        self._box.clients.acquire(self._model(), self._random.choice((1, 10, 100)))

    def _renew(self) -> None:
        if leases := self._box.leases:
            self._box.clients.renew(self._random.choice(leases))

    def _release(self) -> None:
        if leases := self._box.leases:
            self._box.clients.release(self._random.choice(leases))

    def _expire(self) -> None:
        self._box.step(self._random.choice((1, 10, 60, 400)))

    def _crash(self) -> None:
        self._box.crash(self._random.randrange(100))

    def _hang(self) -> None:
        self._box.hang(self._random.randrange(100))

    def _fate(self) -> None:
        self._box.fate(self._random.choice([*_MOSTLY, *Fate]))

    def _hub(self) -> None:
        self._box.hub(self._random.random() < 0.3)

    def _kernel(self) -> None:
        self._box.kernel(self._random.random() < 0.3)

    def _delete(self) -> None:
        self._box.delete()

    def _restart(self) -> None:
        self._box.restart(patience_s=self._random.choice((0, 5, 60)))
