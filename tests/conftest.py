"""What holds for every test, and the models that they load."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.tiny_models import build_tiny_model

# The tests' own torch processes share few cores with the daemon's; see LocalLauncher.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What workers remember of models goes nowhere near the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


REAL_MODEL = Path(".cache/models/SmolLM2-135M-Instruct").absolute()


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    assert REAL_MODEL.is_dir(), "there is no demo model: run `make model`"
    return REAL_MODEL


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")
