"""Files that are damaged, missing or named to do harm: never loaded, fetched again if possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loaderd.client import errors
from tests.faults.daemon.box import QUICK, Box
from tests.faults.daemon.cases import CORRUPT
from tests.faults.daemon.checks import fails
from tests.hub import Hub, HubRepo, faults, files_below
from tests.hub.tiny_models import build_tiny_model
from tests.unit.store.caches import SHARDED_MODEL, index

INDEX = "model.safetensors.index.json"
PROMPT = "The sky is"


# --- an index that leads out ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    ["../../../../evil.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\n.safetensors"],
)
def test_an_index_that_leads_out_of_the_model_is_refused(box: Box, shard: str) -> None:
    repo_id = box.publish({**SHARDED_MODEL, INDEX: index(shard)})
    surroundings = box.disk.surroundings(repo_id)
    error = fails(box, repo_id, CORRUPT)
    assert error.metadata["file"] == INDEX
    assert not box.disk.repo(repo_id).exists()
    assert box.disk.surroundings(repo_id) == surroundings

    repo = HubRepo(repo_id)
    repo.commit(SHARDED_MODEL)
    box.hub.add(repo)
    assert box.client.cache.download(repo_id).complete


def test_an_index_of_other_content_than_listed_is_refused(box: Box) -> None:
    repo_id = box.publish(SHARDED_MODEL)
    box.hub.inject(faults.wrong_bytes(), path=f"*/{INDEX}")
    error = fails(box, repo_id, CORRUPT)
    assert error.metadata["file"] == INDEX

    box.hub.heal()
    assert box.client.cache.download(repo_id).complete


# --- damage in the cache -------------------------------------------------------------------------


def _cut(shard: Path) -> None:
    blob = shard.resolve()
    blob.write_bytes(blob.read_bytes()[:1000])


def _overwrite(shard: Path) -> None:
    blob = shard.resolve()
    blob.write_bytes(b"\0" * 64 + blob.read_bytes()[64:])


def _take_away(shard: Path) -> None:
    shard.resolve().unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], type[errors.LoaderdError]]] = {
    "cut": (_cut, errors.SnapshotCorruptError),
    "overwritten": (_overwrite, errors.SnapshotCorruptError),
    "missing": (_take_away, errors.SnapshotIncompleteError),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several shards."""
    folder = tmp_path_factory.mktemp("models") / "sharded"
    return build_tiny_model(folder, max_shard_size="100KB")


@pytest.fixture(scope="module")
def loading_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A daemon whose loads are quick; its hub can be stopped."""
    arguments = (*QUICK, "--standby", "1")
    with Hub() as hub, Box.running(tmp_path_factory.mktemp("loading"), hub, arguments) as box:
        yield box


@pytest.mark.parametrize(("damage", "error"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_never_loaded_and_is_fetched_again_once(
    loading_box: Box,
    sharded: Path,
    damage: Callable[[Path], None],
    error: type[errors.LoaderdError],
) -> None:
    box = loading_box
    repo_id = box.publish(files_below(sharded))
    snapshot = box.client.cache.download(repo_id)
    shard = max(Path(snapshot.path).glob("*.safetensors"))
    damage(shard)

    asked = len(box.hub.requests)
    with Box.running(box.disk.folder, box.hub, (*QUICK, "--offline")) as offline:
        with pytest.raises(error) as caught:
            offline.client.load(repo_id)
        assert caught.value.metadata.items() >= {"model": repo_id, "file": shard.name}.items()
        assert caught.value.code is error.code
    assert len(box.hub.requests) == asked
    assert not [s for s in box.client.cache.snapshots() if s.repo_id == repo_id and s.complete]

    model = box.client.load(repo_id)
    assert model.generate(PROMPT, max_new_tokens=2, ignore_eos=True).text
    model.unload()
    fetched = [each for each in box.hub.requests[asked:] if "/resolve/" in each.path]
    assert [each.path.rpartition("/")[2] for each in fetched] == [shard.name]
    box.disk.check_contents(repo_id)


def test_a_flipped_bit_is_found_and_only_that_file_is_fetched_again(
    box: Box, sharded: Path
) -> None:
    repo_id = box.publish(files_below(sharded))
    snapshot = box.client.cache.download(repo_id)
    shard = max(Path(snapshot.path).glob("*.safetensors"))
    blob = shard.resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)

    report = box.client.cache.verify(repo_id)
    assert [problem.path for problem in report.problems] == [shard.name]
    asked = len(box.hub.requests)
    report = box.client.cache.verify(repo_id, repair=True)
    assert report.repaired
    fetched = [each for each in box.hub.requests[asked:] if "/resolve/" in each.path]
    assert [each.path.rpartition("/")[2] for each in fetched] == [shard.name]
    box.disk.check_contents(repo_id)
    assert box.client.cache.verify(repo_id).problems == ()
