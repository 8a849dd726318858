"""What holds for every test, and the models that they load."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.hub.tiny_models import build_tiny_model

# The tests' torch processes and their daemons' workers share few cores. Models this small gain
# nothing from threads, which wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says something of the box only.
settings.register_profile("any box", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any box")


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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what a longer run of the fuzz test is asked for with."""
    parser.addoption(
        "--fuzz-examples", type=int, default=15, help="requests to each method, in each round (15)"
    )
