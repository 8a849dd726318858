"""What is damaged, or was never hashed: verified, repaired, and never loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaderd.client import Client, FileProblem, errors
from tests.daemon import SpawnedDaemon
from tests.hub import Hub, HubRepo
from tests.hub.tiny_models import build_tiny_model


def test_verification_names_each_bad_file_and_repairs_just_those(
    hub: Hub, daemon: SpawnedDaemon, client: Client
) -> None:
    folder = Path(client.cache.download("org/a").path)
    assert client.cache.verify("org/a").ok
    weights = (folder / "model.safetensors").resolve()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (folder / "tokenizer.json").resolve().unlink()

    problems: list[FileProblem] = []

    def look(update: object) -> None:
        if isinstance(update, FileProblem):
            problems.append(update)

    report = client.cache.verify("org/a", on_progress=look)
    assert not report.ok
    found = {(each.path, each.kind.name) for each in report.problems}
    assert found == {("model.safetensors", "CONTENT"), ("tokenizer.json", "MISSING")}
    assert {(each.path, each.kind.name) for each in problems} == found

    hub.stop()
    with pytest.raises(errors.HubUnreachableError):
        client.cache.verify("org/a", repair=True)
    assert weights.exists(), "what is there stays until there is better"
    hub.start()
    before = len(hub.requests)
    report = client.cache.verify("org/a", repair=True)
    assert (report.ok, report.repaired) == (True, True)
    assert {each.path for each in report.problems} == {"model.safetensors", "tokenizer.json"}
    fetched = [each.path for each in hub.requests[before:] if "/resolve/" in each.path]
    assert sorted(path.rpartition("/")[2] for path in fetched) == [
        "model.safetensors",
        "tokenizer.json",
    ]
    assert weights.read_bytes() == content
    assert client.cache.verify("org/a").ok

    with pytest.raises(errors.SnapshotNotFoundError):
        client.cache.verify("org/none")
    with pytest.raises(errors.InvalidNameError):
        client.cache.verify(str(folder))


def flip_a_bit(path: Path) -> None:
    """Alters the file's content and neither its size nor its header."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


def test_a_load_never_takes_altered_weights(
    hub: Hub, daemon: SpawnedDaemon, client: Client
) -> None:
    folder = Path(client.cache.download("org/tiny").path)
    weights = (folder / "model.safetensors").resolve()
    content = weights.read_bytes()
    client.load("org/tiny").unload()

    flip_a_bit(weights)
    hub.stop()
    with pytest.raises(errors.SnapshotCorruptError) as caught:
        client.load("org/tiny")
    assert caught.value.file == "model.safetensors"
    (failed,) = client.models()
    assert failed.info.failure is not None
    assert failed.info.failure.reason == "SNAPSHOT_CORRUPT"

    hub.start()
    before = len(hub.requests)
    model = client.load("org/tiny")
    assert model.generate("The sky", max_new_tokens=2, ignore_eos=True).text
    assert weights.read_bytes() == content
    fetched = [each.path for each in hub.requests[before:] if "/resolve/" in each.path]
    assert [path.rpartition("/")[2] for path in fetched] == ["model.safetensors"]


def test_what_another_program_brought_is_hashed_before_its_first_load(
    hub: Hub, daemon: SpawnedDaemon, client: Client
) -> None:
    client.cache.download("org/tiny")
    repo = daemon.cache_dir / "models--org--tiny"
    (repo / ".loaderd.json").unlink()  # as if the daemon had not been there
    (weights,) = (path for path in repo.glob("blobs/*") if len(path.name) == 64)
    content = weights.read_bytes()
    flip_a_bit(weights)
    assert client.load("org/tiny").info.state.name == "READY"
    assert weights.read_bytes() == content


def test_an_index_that_was_altered_hides_no_damage(
    hub: Hub, daemon: SpawnedDaemon, client: Client, tmp_path: Path
) -> None:
    sharded = build_tiny_model(tmp_path / "models" / "sharded", seed=2, max_shard_size="50KB")
    hub.add(HubRepo.from_folder("org/sharded", sharded))
    folder = Path(client.cache.download("org/sharded").path)
    (folder.parents[1] / ".loaderd.json").unlink()
    index = (folder / "model.safetensors.index.json").resolve()
    whole = index.read_text()
    shards = sorted(folder.glob("model-*.safetensors"))
    # Of the same size, and without the last shard, which is damaged too.
    index.write_text(whole.replace(shards[-1].name, shards[0].name))
    damaged = shards[-1].resolve()
    content = damaged.read_bytes()
    flip_a_bit(damaged)
    assert client.load("org/sharded").generate("The sky", max_new_tokens=2, ignore_eos=True).text
    assert index.read_text() == whole
    assert damaged.read_bytes() == content


def test_weights_that_the_listing_lacks_are_not_loaded(
    hub: Hub, daemon: SpawnedDaemon, client: Client, tmp_path: Path
) -> None:
    sharded = build_tiny_model(tmp_path / "models" / "sharded", seed=2, max_shard_size="50KB")
    other = build_tiny_model(tmp_path / "models" / "other", seed=3)
    hub.add(HubRepo.from_folder("org/sharded", sharded))
    folder = Path(client.cache.download("org/sharded").path)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(errors.SnapshotCorruptError) as caught:
        client.load("org/sharded")
    assert caught.value.file == "model.safetensors"
