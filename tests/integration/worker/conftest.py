"""Worker processes; starting one costs seconds, so tests share them where they can."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.worker.harness import Worker


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory, real_model: Path) -> Iterator[Worker]:
    """A worker with the real model, for tests that leave it as they found it.

    In 32 bits, where another order of sums changes no token.
    """
    worker = Worker(tmp_path_factory.mktemp("worker"))
    worker.expect("standby")
    worker.load(real_model, dtype="DTYPE_FLOAT32")
    yield worker
    worker.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    """Starts workers of the test's own, and ends them after it."""
    workers: list[Worker] = []

    def new() -> Worker:
        folder = tmp_path / f"worker-{len(workers)}"
        folder.mkdir()
        workers.append(Worker(folder))
        return workers[-1]

    yield new
    for worker in workers:
        worker.close()
