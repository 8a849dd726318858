"""Worker processes; starting one costs seconds, so tests share them where they can."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub.tiny_models import build_tiny_model
from tests.integration.worker.harness import Worker

# As in a worker: tests share the processors with much else.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory, real_model: Path) -> Iterator[Worker]:
    """A worker with the real model, for tests that leave it as they found it."""
    worker = Worker(tmp_path_factory.mktemp("worker"))
    worker.expect("standby")
    worker.load(real_model)
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
