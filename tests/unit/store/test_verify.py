"""Verification of made-up caches: what is found, what is never read, and stopping in the middle."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from loaderd.server.errors import SnapshotNotFoundError
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.verify import (
    FileProblem,
    ProblemKind,
    Verification,
    VerificationStoppedError,
    VerifyProgress,
    VerifyReport,
)
from tests.unit.store.caches import (
    COMMIT,
    CONFIG,
    SHARDED_MODEL,
    SMALL_MODEL,
    MadeUpRepo,
    entry,
    index,
    made_up_repo,
    open_to_all,
    safetensors,
    write_folder,
)

WEIGHTS = "model.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def repo(cache: Path) -> MadeUpRepo:
    return made_up_repo(cache)


def verify(repo: MadeUpRepo, *, allow_pickle: bool = False) -> VerifyReport:
    """The report; what was told on the way must agree with it."""
    updates: list[VerifyProgress | FileProblem] = []
    verification = Verification(repo.folder, COMMIT, allow_pickle=allow_pickle)
    report = verification.run(updates.append, threading.Event())
    told = [update for update in updates if isinstance(update, FileProblem)]
    assert sorted(told, key=lambda problem: problem.path) == list(report.problems)
    return report


def problem(repo: MadeUpRepo, *, allow_pickle: bool = False) -> FileProblem:
    (found,) = verify(repo, allow_pickle=allow_pickle).problems
    return found


def right(files: Mapping[str, bytes], *unverifiable: str) -> VerifyReport:
    return VerifyReport((), len(files), sum(map(len, files.values())), unverifiable)


@pytest.mark.parametrize("files", [SMALL_MODEL, SHARDED_MODEL], ids=["one file", "shards"])
@pytest.mark.parametrize("listed", [True, False], ids=["with listing", "without"])
def test_a_snapshot_as_it_should_be(
    repo: MadeUpRepo, files: dict[str, bytes], listed: bool
) -> None:
    files = {**files, "README.md": b"hello", "additional_chat_templates/rag.jinja": b"{{ x }}"}
    repo.add(files, listing={**files, "pytorch_model.bin": b"..."} if listed else None)
    assert verify(repo) == right(files)


def test_a_snapshot_that_is_not_there(repo: MadeUpRepo) -> None:
    with pytest.raises(SnapshotNotFoundError, match=f"org/model@{COMMIT}"):
        verify(repo)


@pytest.mark.parametrize("listed", [True, False], ids=["with listing", "without"])
@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "README.md"])
def test_another_content_of_the_right_size(repo: MadeUpRepo, name: str, listed: bool) -> None:
    files = {**SMALL_MODEL, "README.md": b"hello"}
    repo.add(files, listing=files if listed else None)
    blob = repo.blob(name)
    damaged = blob.read_bytes()[:-1] + b"\xff"
    blob.write_bytes(damaged)
    found = problem(repo)
    assert (found.path, found.kind) == (name, ProblemKind.CONTENT)
    assert (found.expected, found.found) == (
        entry(name, files[name]).digest,
        entry(name, damaged).digest,
    )
    assert verify(repo).verified_files == len(files) - 1


def test_another_size_is_told_without_reading(repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL, listing=SMALL_MODEL)
    size = len(SMALL_MODEL[WEIGHTS])
    repo.blob(WEIGHTS).write_bytes(SMALL_MODEL[WEIGHTS][:-9])
    assert problem(repo) == FileProblem(
        WEIGHTS, ProblemKind.SIZE, f"{size} bytes", f"{size - 9} bytes"
    )


def test_another_size_without_a_listing_is_another_content(repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL)
    repo.blob("tokenizer.json").write_bytes(b"{ }")
    assert problem(repo).kind is ProblemKind.CONTENT


@pytest.mark.parametrize("name", [WEIGHTS, "README.md"])
def test_a_link_to_nothing(repo: MadeUpRepo, name: str) -> None:
    repo.add({**SMALL_MODEL, "README.md": b"hello"})
    repo.blob(name).unlink()
    assert problem(repo) == FileProblem(name, ProblemKind.MISSING, "a file", "nothing")


def test_everything_that_loading_needs_and_is_missing_is_named(repo: MadeUpRepo) -> None:
    missing = {"model-1-of-2.safetensors", "model-2-of-2.safetensors", "tokenizer.json"}
    there = {name: content for name, content in SHARDED_MODEL.items() if name not in missing}
    repo.add(there, listing={**SHARDED_MODEL, "README.md": b"not needed"})
    report = verify(repo)
    assert {found.path for found in report.problems} == missing
    assert {found.kind for found in report.problems} == {ProblemKind.MISSING}
    assert report.verified_files == len(there)


def test_a_missing_index_is_named(repo: MadeUpRepo) -> None:
    name = "model.safetensors.index.json"
    repo.add({n: c for n, c in SHARDED_MODEL.items() if n != name}, listing=SHARDED_MODEL)
    assert problem(repo) == FileProblem(name, ProblemKind.MISSING, "a file", "nothing")


def test_weights_that_were_never_fetched_are_missing(repo: MadeUpRepo) -> None:
    repo.add({"config.json": CONFIG, "tokenizer.json": b"{}"})
    assert problem(repo) == FileProblem(WEIGHTS, ProblemKind.MISSING, "a file", "nothing")


def test_several_problems_come_by_path(repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL, listing=SMALL_MODEL)
    repo.blob("config.json").write_bytes(b'{"model_type": "LLAMA"}')
    repo.blob(WEIGHTS).write_bytes(b"short")
    repo.blob("tokenizer_config.json").unlink()
    assert [(found.path, found.kind) for found in verify(repo).problems] == [
        ("config.json", ProblemKind.CONTENT),
        (WEIGHTS, ProblemKind.SIZE),
        ("tokenizer_config.json", ProblemKind.MISSING),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (WEIGHTS, safetensors()[:-1]),
        ("config.json", b"[]"),
        ("model.safetensors.index.json", index("../../evil.safetensors")),
    ],
)
def test_a_bad_upload_shows_although_its_hash_is_right(
    repo: MadeUpRepo, name: str, content: bytes
) -> None:
    files = {**(SHARDED_MODEL if "index" in name else SMALL_MODEL), name: content}
    repo.add(files, listing=files)
    report = verify(repo)
    assert [(found.path, found.kind) for found in report.problems] == [(name, ProblemKind.CONTENT)]
    assert report.verified_files == len(files)


# --- links ---------------------------------------------------------------------------------------


def _to_a_file(outside: Path) -> Path:
    outside.write_bytes(b"{}")
    return outside


def _to_a_folder(outside: Path) -> Path:
    outside.mkdir()
    return outside


def _to_a_pipe(outside: Path) -> Path:
    os.mkfifo(outside)  # reading it would never end
    return outside


@pytest.mark.parametrize("make", [_to_a_file, _to_a_folder, _to_a_pipe])
@pytest.mark.parametrize("name", ["tokenizer.json", "extra.txt"])
def test_a_link_out_of_the_repository_is_told_and_not_followed(
    repo: MadeUpRepo, tmp_path: Path, name: str, make: Callable[[Path], Path]
) -> None:
    folder = repo.add({**SMALL_MODEL, "extra.txt": b""}, listing=SMALL_MODEL)
    target = make(tmp_path / hashlib.sha256(b"{}").hexdigest())
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    found = problem(repo)
    assert (found.path, found.kind) == (name, ProblemKind.LINK)
    assert str(tmp_path) not in found.expected + found.found


def test_a_blob_that_is_itself_a_link_out_of_the_repository(
    repo: MadeUpRepo, tmp_path: Path
) -> None:
    repo.add(SMALL_MODEL)
    blob = repo.blob("tokenizer.json")
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    assert problem(repo).kind is ProblemKind.LINK


def test_a_link_to_itself_and_one_to_a_folder_are_no_files(repo: MadeUpRepo) -> None:
    folder = repo.add(SMALL_MODEL)
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "blobs").symlink_to("../../blobs")
    assert [(found.path, found.kind) for found in verify(repo).problems] == [
        ("blobs", ProblemKind.MISSING),
        ("loop.json", ProblemKind.MISSING),
    ]


def test_a_pipe_among_the_blobs_is_not_read(repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL)
    blob = repo.blob("tokenizer_config.json")
    blob.unlink()
    os.mkfifo(blob)
    assert problem(repo).path == "tokenizer_config.json"


def test_blobs_in_the_store_that_repositories_share(cache: Path, repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL)
    blob = repo.blob(WEIGHTS)
    shared = cache / "blobs" / "ab" / "a name that is no digest"
    shared.parent.mkdir(parents=True)
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{shared.name}")
    assert verify(repo) == right(SMALL_MODEL)
    shared.write_bytes(SMALL_MODEL[WEIGHTS][:-1] + b"\xff")
    assert problem(repo).kind is ProblemKind.CONTENT


# --- caches without links, and what others put there ----------------------------------------------


def test_files_in_place_of_links_are_compared_with_the_listing(repo: MadeUpRepo) -> None:
    folder = write_folder(repo.folder.snapshot(COMMIT), {**SMALL_MODEL, "notes.txt": b"mine"})
    repo.add({}, listing=SMALL_MODEL)
    assert verify(repo) == right(SMALL_MODEL, "notes.txt")
    (folder / "tokenizer.json").write_bytes(b"[]")
    assert problem(repo).kind is ProblemKind.CONTENT


def test_files_without_a_known_hash_are_named_and_are_no_problem(repo: MadeUpRepo) -> None:
    folder = write_folder(repo.folder.snapshot(COMMIT), SMALL_MODEL)
    (repo.folder.blobs).mkdir()
    (repo.folder.blobs / "no digest").write_bytes(b"x")
    (folder / "odd").symlink_to("../../blobs/no digest")
    assert verify(repo) == right({}, *sorted([*SMALL_MODEL, "odd"]))


def test_a_listing_with_hashes_that_are_none_is_not_believed(repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL)
    tree = {name: entry(name, content) for name, content in SMALL_MODEL.items()}
    repo.folder.write_tree(COMMIT, tree)
    listing = repo.folder.path / "trees" / f"{COMMIT}.json"
    listing.write_text(listing.read_text().replace(tree["tokenizer.json"].blob_id, "../../x"))
    assert verify(repo) == right(SMALL_MODEL)


def test_a_name_that_is_no_text_can_be_told(repo: MadeUpRepo) -> None:
    folder = repo.add(SMALL_MODEL)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.json")).symlink_to("../../blobs/nothing")
    assert problem(repo).path == "?.json"


_AS_ANOTHER_USER = """
import os, sys, threading
from pathlib import Path
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.verify import Verification
os.setuid(65534)
report = Verification(RepoFolder(Path(sys.argv[1]), "org/model"), "a" * 40).run(
    lambda _: None, threading.Event()
)
print(*((problem.path, str(problem.kind), problem.found) for problem in report.problems))
print(report.verified_files)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can take another user's place")
def test_files_of_another_user_are_read_if_they_may_be(
    cache: Path, repo: MadeUpRepo, tmp_path: Path
) -> None:
    open_to_all(tmp_path)
    repo.add(SMALL_MODEL)
    repo.blob(WEIGHTS).chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", _AS_ANOTHER_USER, cache],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    problems, verified = done.stdout.splitlines()
    assert problems == f"('{WEIGHTS}', 'content', 'not readable: Permission denied')"
    assert int(verified) == len(SMALL_MODEL) - 1


def test_pickles_are_needed_only_where_they_are_allowed(repo: MadeUpRepo) -> None:
    listing = {"config.json": CONFIG, "pytorch_model.bin": b"pickle", "tokenizer.json": b"{}"}
    repo.add({n: c for n, c in listing.items() if n != "pytorch_model.bin"}, listing=listing)
    assert verify(repo).problems == ()
    assert problem(repo, allow_pickle=True).path == "pytorch_model.bin"


# --- how it runs ---------------------------------------------------------------------------------


def test_progress_goes_to_the_end_and_no_update_comes_from_another_thread(
    repo: MadeUpRepo,
) -> None:
    repo.add(SHARDED_MODEL)
    threads, progress = set(), []

    def on_update(update: VerifyProgress | FileProblem) -> None:
        threads.add(threading.get_ident())
        progress.append(update)

    report = Verification(repo.folder, COMMIT).run(on_update, threading.Event())
    last = progress[-1]
    assert isinstance(last, VerifyProgress)
    assert threads == {threading.get_ident()}
    assert last.verified_bytes == last.total_bytes == report.verified_bytes
    assert last.verified_files == last.total_files == len(SHARDED_MODEL)


def test_reading_is_no_use(repo: MadeUpRepo) -> None:
    repo.add(SMALL_MODEL)
    blobs = list(repo.folder.blobs.iterdir())
    for blob in blobs:
        os.utime(blob, (1, 1))
    verify(repo)
    assert [blob.stat().st_atime for blob in blobs] == [1] * len(blobs)


@pytest.fixture
def large(cache: Path) -> RepoFolder:
    """A snapshot with a sparse file that takes many times a test's patience to read."""
    repo = made_up_repo(cache, "org/large")
    repo.add(SMALL_MODEL)
    digest = "d" * 64
    with (repo.folder.blobs / digest).open("wb") as blob:
        blob.truncate(1 << 42)
    (repo.folder.snapshot(COMMIT) / "large.bin").symlink_to(f"../../blobs/{digest}")
    return repo.folder


def test_another_thread_stops_it_in_mid_file(large: RepoFolder) -> None:
    stopped, begun = threading.Event(), threading.Event()
    raised: list[Exception] = []

    def on_update(update: VerifyProgress | FileProblem) -> None:
        if isinstance(update, VerifyProgress) and update.verified_bytes:
            begun.set()

    def run() -> None:
        try:
            Verification(large, COMMIT).run(on_update, stopped)
        except VerificationStoppedError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(30)
    finally:
        stopped.set()
        thread.join(30)
    assert not thread.is_alive()
    assert len(raised) == 1


def test_a_listener_that_fails_ends_it(large: RepoFolder) -> None:
    def on_update(_: VerifyProgress | FileProblem) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        Verification(large, COMMIT).run(on_update, threading.Event())


def test_what_was_stopped_before_it_began_reads_nothing(large: RepoFolder) -> None:
    stopped = threading.Event()
    stopped.set()
    updates: list[VerifyProgress | FileProblem] = []
    with pytest.raises(VerificationStoppedError):
        Verification(large, COMMIT).run(updates.append, stopped)
    assert updates == []
