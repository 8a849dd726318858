"""From a name on the hub to an answer, through the daemon; the hub is the local one."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loaderd.client import (
    Client,
    DownloadPlan,
    FinishReason,
    LoadProgress,
    ModelSource,
    ModelState,
    Snapshot,
    errors,
)
from tests.daemon import SpawnedDaemon
from tests.hub import Access, Hub, HubRepo, faults, files_below
from tests.hub.tiny_models import build_tiny_model

Spawn = Callable[..., SpawnedDaemon]


@pytest.fixture(scope="module")
def other_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture
def hub(tiny_model: Path, other_tiny_model: Path) -> Iterator[Hub]:
    """`org/tiny` with a branch, and a gated repository."""
    tiny = HubRepo("org/tiny")
    tiny.commit(files_below(tiny_model))
    tiny.commit(files_below(other_tiny_model), branch="next")
    gated = HubRepo.from_folder("org/gated", tiny_model, access=Access.GATED, token="t")
    with Hub(tiny, gated) as hub:
        yield hub


@pytest.fixture
def daemon(hub: Hub, spawn: Spawn) -> SpawnedDaemon:
    return spawn("--standby", "0", HF_ENDPOINT=hub.url)


@pytest.fixture
def client(daemon: SpawnedDaemon) -> Iterator[Client]:
    with Client(daemon.address) as client:
        yield client


def test_a_name_is_resolved_downloaded_loaded_and_answers(
    hub: Hub, daemon: SpawnedDaemon, client: Client
) -> None:
    assert not daemon.cache_dir.exists()
    plan = client.cache.resolve("org/tiny")
    assert isinstance(plan, DownloadPlan)
    assert plan.missing_bytes == plan.total_bytes > 0
    assert {"config.json", "model.safetensors"} <= {file.path for file in plan.files}

    steps: list[LoadProgress] = []
    model = client.load("org/tiny", on_progress=steps.append)
    states = [step.state for step in steps]
    assert ModelState.LOADING in states
    downloads = [step.download for step in steps if step.download is not None]
    assert downloads
    assert downloads[-1].total_bytes == plan.total_bytes
    assert all(each.downloaded_bytes <= each.total_bytes for each in downloads if each.total_bytes)
    assert (model.info.source, model.info.repo_id) == (ModelSource.HUB, "org/tiny")
    assert model.info.commit == plan.commit
    answer = model.generate("The sky", max_new_tokens=4, ignore_eos=True)
    assert answer.finish.reason is FinishReason.LENGTH

    (snapshot,) = client.cache.snapshots()
    assert (snapshot.repo_id, snapshot.commit) == ("org/tiny", plan.commit)
    assert snapshot.complete
    assert "main" in snapshot.refs
    cached = client.cache.resolve("org/tiny")
    assert isinstance(cached, Snapshot)
    assert cached.commit == plan.commit


def test_a_cached_model_needs_no_hub(hub: Hub, client: Client) -> None:
    client.cache.download("org/tiny")
    hub.stop()
    model = client.load("org/tiny")
    assert model.info.source is ModelSource.CACHED
    assert model.info.timings.download is None


def test_revisions_stand_side_by_side(client: Client) -> None:
    main, branch = client.load("org/tiny"), client.load("org/tiny@next")
    assert main.info.commit != branch.info.commit
    assert client.model("org/tiny").id == main.id
    assert client.model("org/tiny@next").id == branch.id
    assert client.load(f"org/tiny@{branch.info.commit}").id == branch.id
    assert len(client.cache.snapshots()) == 2
    with pytest.raises(errors.RevisionNotFoundError):
        client.load("org/tiny@no-such-branch")


def test_concurrent_loads_share_one_download(hub: Hub, client: Client) -> None:
    with ThreadPoolExecutor(6) as pool:
        ids = set(pool.map(lambda _: client.load("org/tiny").id, range(6)))
    assert len(ids) == 1
    weights = [
        each for each in hub.requests
        if each.method == "GET" and each.path.endswith("model.safetensors")
    ]  # fmt: skip
    assert len(weights) == 1


def test_a_cancelled_download_stops_and_the_next_one_succeeds(hub: Hub, client: Client) -> None:
    hub.inject(faults.hang(after_bytes=1000), path="*/model.safetensors")
    download = client.cache.start_download("org/tiny")
    for progress in download:
        if progress.total_bytes:
            break
    download.cancel()
    hub.heal()
    assert client.cache.download("org/tiny").complete


def test_missing_and_gated_are_told_apart(client: Client) -> None:
    with pytest.raises(errors.ModelNotFoundError):
        client.load("org/none")
    with pytest.raises(errors.ModelGatedError):
        client.load("org/gated")
    # A name that is nothing is forgotten, a download that failed can be looked at.
    (failed,) = client.models()
    assert failed.info.failure is not None
    assert failed.info.failure.reason == "MODEL_GATED"


def test_an_unreachable_hub(hub: Hub, client: Client) -> None:
    hub.stop()
    with pytest.raises(errors.HubUnreachableError) as caught:
        client.load("org/tiny")
    assert caught.value.retry_after
    assert len(client.cache.snapshots()) == 0


def test_offline_says_so_at_once(spawn: Spawn, hub: Hub) -> None:
    daemon = spawn("--standby", "0", "--offline", HF_ENDPOINT=hub.url)
    with Client(daemon.address) as client, pytest.raises(errors.OfflineNotCachedError):
        client.load("org/tiny")
    assert hub.requests == []


def test_a_corrupted_entry_is_fetched_again(
    hub: Hub, daemon: SpawnedDaemon, client: Client
) -> None:
    snapshot = client.cache.download("org/tiny")
    blob = (Path(snapshot.path) / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:1000])
    model = client.load("org/tiny")
    assert model.generate("The sky", max_new_tokens=2, ignore_eos=True).text
    assert blob.stat().st_size > 1000


def test_a_daemon_that_stops_leaves_no_download_behind(
    hub: Hub, daemon: SpawnedDaemon, client: Client
) -> None:
    hub.inject(faults.hang(after_bytes=1000), path="*/model.safetensors")
    failures: list[BaseException] = []

    def download() -> None:
        try:
            client.cache.download("org/tiny")
        except errors.LoaderdError as error:
            failures.append(error)

    thread = threading.Thread(target=download)
    thread.start()
    while not any(each.path.endswith("model.safetensors") for each in hub.requests):
        thread.join(0.05)
        assert thread.is_alive()
    assert daemon.stop() == 0
    thread.join(20)
    assert [type(failure) for failure in failures] == [errors.DrainingError]
