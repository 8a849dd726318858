"""kill -9 of a daemon that has models to be there always: the next one has them again."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from loaderd.client import Client, Model, ModelState
from tests.daemon import SpawnedDaemon
from tests.hub.tiny_models import build_tiny_model
from tests.waiting import until

PATIENCE_S = 120


class Place:
    """Where one daemon after the other runs, with the same settings.

    Args:
        folder: Everything that they write is below it.
        declared: The model of `[[models]]`.
        preloaded: The one of `--preload`.
    """

    def __init__(self, folder: Path, declared: Path, preloaded: Path) -> None:
        self.socket = folder / "run" / "api" / "loaderd.sock"
        self.private = folder / "run" / "private"
        self.socket.parent.mkdir(parents=True)
        self.private.mkdir()
        self._folder = folder
        config = folder / "loaderd.toml"
        config.write_text(f'[[models]]\nname = "{declared}"\nkeep_alive = 600\ndtype = "float32"\n')
        self._arguments = [
            f"--config={config}",
            f"--preload={preloaded}",
            f"--socket={self.socket}",
            *(f"--allow-local={model.parent}" for model in (declared, preloaded)),
            "--standby=0",
        ]

    def start(self) -> SpawnedDaemon:
        variables = {"XDG_RUNTIME_DIR": str(self.private)}
        return SpawnedDaemon(self._folder, self._arguments, variables)

    def files(self) -> list[str]:
        """The private folders of daemons, and what is beside their socket."""
        folders = (self.private, self.socket.parent)
        return sorted(path.name for folder in folders for path in folder.iterdir())


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for sockets, whose paths have a limit that pytest's own folders come close to."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_models_that_are_to_be_there_always_outlive_a_daemon_that_is_killed(
    tiny_model: Path, tmp_path: Path, short_path: Path
) -> None:
    place = Place(short_path, tiny_model, build_tiny_model(tmp_path / "other", seed=1))
    first = place.start()
    until(lambda: bool(first.workers()), PATIENCE_S)
    kill(first)  # while it loads
    (left,) = place.private.iterdir()

    second = place.start()
    assert left.name not in place.files()
    with Client(second.address) as client:
        models = both_ready(client)
        with models[tiny_model.name].stream("a", max_new_tokens=200, ignore_eos=True) as stream:
            next(iter(stream))
            kill(second)  # while it generates
    (left,) = place.private.iterdir()

    with place.start() as third:
        with Client(f"unix:{place.socket}") as client:
            assert client.info().pid == third.process.pid
            again = both_ready(client)
            assert {model.id for model in again.values()}.isdisjoint(
                model.id for model in models.values()
            )
            for model in again.values():
                assert model.generate("a", max_new_tokens=4, ignore_eos=True).text
            pids = {model.details.worker_pid for model in again.values() if model.details}
        assert {worker.pid for worker in third.workers()} == pids
        (folder,) = place.private.iterdir()
        assert folder != left
        assert place.files() == [folder.name, "loaderd.sock", "loaderd.sock.lock"]
        assert third.stop() == 0
    assert place.files() == ["loaderd.sock.lock"]
    assert "Traceback" not in third.log


def both_ready(client: Client) -> dict[str, Model]:
    """The models by the last part of their names, once both are READY."""

    def ready() -> list[Model]:
        return [model for model in client.models() if model.state is ModelState.READY]

    until(lambda: len(ready()) == 2, PATIENCE_S)
    models = {Path(model.name).name: model for model in ready()}
    keep_alives = {model.info.keep_alive for model in models.values()}
    assert len(keep_alives) == 2, "of the manifest, and always"
    return models


def kill(daemon: SpawnedDaemon) -> None:
    """SIGKILL; returns when nothing of it runs."""
    workers = daemon.workers()
    assert workers
    daemon.stop(signal.SIGKILL)
    until(lambda: not any(runs(worker) for worker in workers))


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; its parent may be too busy to take notice of it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
