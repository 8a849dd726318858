"""What a worker does before it stands by."""

from __future__ import annotations

import logging
import threading

import pytest

from loaderd.server.worker.warm_up import warm_up


def test_a_made_up_model_is_loaded_and_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="loaderd"):
        warm_up()

    assert caplog.records == []  # it would tell why it could not
    names = {thread.name for thread in threading.enumerate()}
    assert names.isdisjoint({"warm-up", "engine"})  # OpenMP keeps threads for each that computed
