"""The rate of a download, by a clock that the test moves."""

from __future__ import annotations

from loaderd.server.store.rate import Rate


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def rates(*steps: tuple[float, int]) -> list[float]:
    """What the rate is after each step: seconds that pass, and the total then."""
    clock = Clock()
    rate = Rate(clock)
    found = []
    for seconds, total in steps:
        clock.now += seconds
        found.append(rate.update(total))
    return found


def test_what_was_there_before_did_not_come_now() -> None:
    assert rates((0, 500), (1, 510)) == [0.0, 10.0]


def test_it_is_the_mean_since_the_start_at_first() -> None:
    assert rates((0, 0), (2, 100), (2, 400)) == [0.0, 50.0, 100.0]


def test_what_is_older_than_ten_seconds_does_not_count() -> None:
    assert rates((0, 0), (1, 5000), (10, 5100), (5, 5300)) == [0.0, 5000.0, 10.0, 30.0]


def test_it_falls_to_nothing_when_nothing_comes() -> None:
    assert rates((0, 0), (1, 100), (4, 100), (6, 100)) == [0.0, 100.0, 20.0, 0.0]


def test_what_is_discarded_is_no_negative_rate() -> None:
    assert rates((0, 0), (1, 100), (1, 0), (2, 60)) == [0.0, 100.0, 50.0, 40.0]


def test_no_time_is_no_rate() -> None:
    assert rates((0, 0), (0, 100)) == [0.0, 0.0]
