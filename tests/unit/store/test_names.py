"""Names: what is one, what is not, and that none leads out of the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from loaderd.server.errors import InvalidNameError
from loaderd.server.store.cache import RepoFolder
from loaderd.server.store.names import HubName, LocalName, parse_name, parse_name_or_path

CACHE = Path("/var/cache/hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Pieces that names are made of, and those that attacks are made of.
PIECES = st.sampled_from(
    ["org", "model", "gpt2", "main", "refs", "pr", "1", "/", "//", "@", ".", "..", "-", "--", "_",
     "~", "\\", "\0", "\n", " ", "%2e", "a" * 97, "ü", "\ud800", ".git", ".lock", COMMIT]
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=8).map("".join))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/model", HubName("org/model")),
        ("gpt2", HubName("gpt2")),
        ("org/model@main", HubName("org/model", "main")),
        ("org/Model-1.5_b@v1.0", HubName("org/Model-1.5_b", "v1.0")),
        ("org/model@refs/pr/1", HubName("org/model", "refs/pr/1")),
        (f"org/model@{COMMIT}", HubName("org/model", COMMIT)),
        ("/models/llama", LocalName(Path("/models/llama"))),
        ("/models/my model@home", LocalName(Path("/models/my model@home"))),
    ],
)
def test_names_are_read(text: str, name: HubName | LocalName) -> None:
    assert parse_name(text) == name


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "is empty"),
        ("./model", "make it absolute"),
        ("../model", "make it absolute"),
        ("~/model", "make it absolute"),
        ("a/b/c", "a local path starts with /"),
        ("org/model@", "name a branch, tag or commit"),
        ("org/model@../../etc", "a revision is a branch"),
        ("org/model@/etc/passwd", "a revision is a branch"),
        ("org/model@a..b", "'..'"),
        ("org/model@a\\b", "a revision is a branch"),
        ("org/model@main\n", "a revision is a branch"),
        ("org/model@-f", "starting with"),
        ("org/model@main.lock", ".lock"),
        ("org/model@" + "a" * 201, "longer than 200"),
        ("org/" + "a" * 97, "1 to 96"),
        ("org/model.git", "leave it out"),
        ("org--model", "'--'"),
        ("org/..model", "letters, digits"),
        ("org/model\n", "letters, digits"),
        ("https://huggingface.co/org/model", "org/name"),
        ("org/modèl", "letters, digits"),
        ("/models/\0", "control characters"),
        ("/" + "a" * 4096, "longer than 4096"),
    ],
)
def test_other_texts_are_refused_with_advice(text: str, advice: str) -> None:
    with pytest.raises(InvalidNameError) as caught:
        parse_name(text, "field_name")
    assert caught.value.field == "field_name"
    assert advice in caught.value.problem


def test_a_name_is_written_as_it_is_read() -> None:
    assert str(HubName("org/model")) == "org/model"
    assert str(HubName("org/model", "v1")) == "org/model@v1"
    assert str(LocalName(Path("/models/a"))) == "/models/a"


def test_only_a_full_lower_case_hash_is_a_commit() -> None:
    assert HubName("a", COMMIT).commit == COMMIT
    assert HubName("a", COMMIT[:39]).commit is None
    assert HubName("a", COMMIT.upper()).commit is None


@given(TEXTS)
@example("org/model@..")
@example("org/model@a/../../../b")
@example(".git/..")
def test_any_text_is_refused_or_stays_inside_the_cache(text: str) -> None:
    try:
        name = parse_name(text)
    except InvalidNameError:
        return
    if isinstance(name, LocalName):
        assert name.path.is_absolute()
        assert os.fsencode(name.path)
        return
    repo = RepoFolder(CACHE, name.repo_id)
    for path, parent in [
        (repo.path, CACHE),
        (repo.locks, CACHE / ".locks"),
        (repo.path / "refs" / name.revision, repo.path / "refs"),
        (repo.snapshot(name.revision), repo.path / "snapshots"),
    ]:
        normal = Path(os.path.normpath(path))
        assert normal.is_relative_to(parent)
        assert normal != parent
    assert all(len(part.encode()) <= 255 for part in repo.path.parts)
    assert parse_name(str(name)) == name


@given(st.one_of(TEXTS, st.from_regex(r"[\w.-]{1,50}(/[\w.-]{1,98})?", fullmatch=True)))
@example("a" * 96)
@example("a" * 97)
@example("org/a.git")
def test_repositories_are_those_of_the_hub_library(text: str) -> None:
    try:
        validate_repo_id(text)
        valid = bool(text) and len(text.partition("/")[0]) <= 96  # it has no bound there
    except HFValidationError:
        valid = False
    try:
        HubName(text)
    except InvalidNameError:
        assert not valid
    else:
        assert valid


def test_a_library_user_may_give_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "model").mkdir(parents=True)
    here = LocalName(tmp_path / "org" / "model")
    assert parse_name_or_path("./org/model") == here
    assert parse_name_or_path("~/org/model") == here
    assert parse_name_or_path("org/model") == here  # a folder wins
    assert parse_name_or_path("./nothing") == LocalName(tmp_path / "nothing")
    assert parse_name_or_path("org/other@v1") == HubName("org/other", "v1")
    for text in ("", "~nobody-has-this-name/model", "a/b/c", "a\0b"):
        with pytest.raises(InvalidNameError):
            parse_name_or_path(text)
