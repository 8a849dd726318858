"""The devices of a simulated box, and who has really taken their memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from loaderd.server.models.where import CPU
from loaderd.v1.system_pb2 import Device, DeviceType

GB = 10**9


@dataclass(frozen=True)
class Card:
    """A device.

    Attributes:
        id: Its name in a device map.
        kind: What it is.
        total_bytes: Its memory.
        others_bytes: Of that, what other processes of the box have, always.
        pool: The device whose memory it is.
    """

    id: str
    kind: DeviceType.ValueType
    total_bytes: int
    others_bytes: int = 0
    pool: str = ""


def _cuda(index: int, size: int, others: int = 0) -> Card:
    return Card(f"cuda:{index}", DeviceType.DEVICE_TYPE_CUDA, size * GB, others * GB)


def _cpu(size: int, others: int) -> Card:
    return Card(CPU, DeviceType.DEVICE_TYPE_CPU, size * GB, others * GB)


INVENTORIES: Mapping[str, tuple[Card, ...]] = {
    "8 x 80 GB": (*(_cuda(index, 80) for index in range(8)), _cpu(512, 20)),
    "mixed cards": (_cuda(0, 80), _cuda(1, 24, others=2), _cuda(2, 16), _cpu(128, 10)),
    "unified memory": (
        Card("mps:0", DeviceType.DEVICE_TYPE_MPS, 48 * GB, pool=CPU),
        _cpu(64, 8),
    ),
    "CPU only": (_cpu(64, 4),),
}


class Hardware:
    """The memory of a box.

    Args:
        cards: Its devices, accelerators first.

    Attributes:
        cards: As above.
        overcommitted: What was taken though it was not there, as sentences.
    """

    def __init__(self, cards: tuple[Card, ...]) -> None:
        self.cards = cards
        self.overcommitted: list[str] = []
        self._cards = {card.id: card for card in cards}
        self._taken: dict[str, dict[int, int]] = defaultdict(dict)

    def take(self, pid: int, device: str, total: int) -> None:
        """A process comes to hold `total` bytes of a device."""
        pool = self.pool(device)
        self._taken[pool][pid] = total
        if self.free(device) < 0:
            self.overcommitted.append(f"{pool} lacks {-self.free(device)} bytes for {pid}")

    def give_back(self, pid: int) -> None:
        """A process has ended."""
        for taken in self._taken.values():
            taken.pop(pid, None)

    def held(self, pid: int) -> int:
        """Bytes that a process has of all devices."""
        return sum(taken.get(pid, 0) for taken in self._taken.values())

    def pool(self, device: str) -> str:
        """Whose memory a device has."""
        return self._cards[device].pool or device

    def free(self, device: str) -> int:
        """Bytes that nobody has of a device's memory; less than 0 if too much was taken."""
        pool = self._cards[self.pool(device)]
        return pool.total_bytes - pool.others_bytes - sum(self._taken[pool.id].values())

    def seen(self) -> list[Device]:
        """All devices as they are now."""
        return [
            Device(
                id=card.id,
                type=card.kind,
                total_bytes=card.total_bytes,
                free_bytes=max(min(self.free(card.id), card.total_bytes), 0),
            )
            for card in self.cards
        ]

    def cpu(self) -> Device:
        """The CPU as it is now."""
        return self.seen()[-1]
