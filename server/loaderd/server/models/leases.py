"""What holds models between calls."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loaderd.server.errors import InvalidArgumentError, LeaseNotFoundError, QueueFullError

SHORTEST_TTL_S = 1.0
LONGEST_TTL_S = 24 * 3600.0
MOST_LEASES = 1024
"""Of one model."""


@dataclass
class Lease:
    """A hold on a model that ends by itself.

    Attributes:
        id: A secret of whoever acquired it.
        model_id: The model.
        ttl_s: Seconds that it lives after its last renewal.
        expires: Monotonic time of its end, while no request uses it.
        users: Requests that use it.
    """

    id: str
    model_id: str
    ttl_s: float
    expires: float
    users: int = 0


class Leases:
    """All leases of the daemon.

    Args:
        clock: Monotonic seconds.
        changed: Called when some lease begins, ends later or ends now.
        ended: Called with the model of a lease that ended and the monotonic time at which it did.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        changed: Callable[[], None],
        ended: Callable[[str, float], None],
    ) -> None:
        self._clock = clock
        self._changed = changed
        self._ended = ended
        self._leases: dict[str, Lease] = {}

    def acquire(self, model_id: str, ttl_s: float) -> Lease:
        """A new lease.

        Raises:
            InvalidArgumentError: The time is out of bounds.
            QueueFullError: The model has too many.
        """
        check_ttl(ttl_s, "ttl")
        if len(self.of(model_id)) >= MOST_LEASES:
            raise QueueFullError(model=model_id, limit=MOST_LEASES)
        lease = Lease(secrets.token_hex(16), model_id, ttl_s, self._clock() + ttl_s)
        self._leases[lease.id] = lease
        self._changed()
        return lease

    def renew(self, lease_id: str) -> Lease:
        """Starts a lease's time anew.

        Raises:
            LeaseNotFoundError: It has ended.
        """
        lease = self._find(lease_id)
        self._extend(lease)
        return lease

    @contextmanager
    def use(self, lease_id: str, model_id: str) -> Iterator[None]:
        """A request that names a lease: it does not end meanwhile, and is renewed at the end.

        Raises:
            LeaseNotFoundError: It has ended, or holds another model.
        """
        lease = self._find(lease_id)
        if lease.model_id != model_id:
            raise LeaseNotFoundError(lease_id)
        lease.users += 1
        try:
            yield
        finally:
            lease.users -= 1
            self._extend(lease)

    def release(self, lease_id: str) -> None:
        """Ends a lease.

        Raises:
            LeaseNotFoundError: It has ended already.
        """
        self._end(self._find(lease_id), self._clock())
        self._changed()

    def check(self, lease_id: str) -> None:
        """Raises LeaseNotFoundError when a lease has ended."""
        self._find(lease_id)

    def of(self, model_id: str) -> list[Lease]:
        """Those that hold a model now."""
        self._drop_expired()
        return [lease for lease in self._leases.values() if lease.model_id == model_id]

    def drop(self, model_id: str) -> None:
        """Ends all of a model."""
        for lease in self.of(model_id):
            del self._leases[lease.id]

    def _extend(self, lease: Lease) -> None:
        lease.expires = self._clock() + lease.ttl_s
        self._changed()

    def _find(self, lease_id: str) -> Lease:
        self._drop_expired()
        try:
            return self._leases[lease_id]
        except KeyError:
            raise LeaseNotFoundError(lease_id) from None

    def _drop_expired(self) -> None:
        now = self._clock()
        for lease in list(self._leases.values()):
            if lease.expires <= now and not lease.users:
                self._end(lease, lease.expires)

    def _end(self, lease: Lease, when: float) -> None:
        del self._leases[lease.id]
        self._ended(lease.model_id, when)


def check_ttl(ttl_s: float, field: str) -> None:
    """Checks the length of a lease before there is one.

    Raises:
        InvalidArgumentError: It is out of bounds.
    """
    if not SHORTEST_TTL_S <= ttl_s <= LONGEST_TTL_S:
        raise InvalidArgumentError(field, "must be from 1 second to 24 hours")
