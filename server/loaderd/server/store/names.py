"""Model names: a repository of the hub at a revision, or a local folder.

Pure but for `parse_name_or_path`, which asks whether a folder exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from loaderd.server.errors import InvalidNameError

DEFAULT_REVISION = "main"

MAX_PATH_LENGTH = 4096
MAX_REVISION_LENGTH = 200

_COMMIT = re.compile(r"[0-9a-f]{40}")
# A part of a repository id, as `huggingface_hub.utils.validate_repo_id` has it.
_REPO_PART = re.compile(r"[0-9A-Za-z_]([0-9A-Za-z_.-]{0,94}[0-9A-Za-z_])?")
# What git allows between the slashes of a ref, without what a shell or a URL would quote.
_REVISION_PART = re.compile(r"[0-9A-Za-z_+=#@][0-9A-Za-z_+=#@.-]*")
_LOCAL_STARTS = ("/", "~", ".")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class HubName:
    """A repository of the hub at a revision.

    Attributes:
        repo_id: `org/name`, or `name` for the few repositories without an owner.
        revision: A branch, a tag, or a commit of 40 hex digits.
    """

    repo_id: str
    revision: str = DEFAULT_REVISION

    def __post_init__(self) -> None:
        if problem := _repo_id_problem(self.repo_id) or _revision_problem(self.revision):
            raise InvalidNameError("model", problem)

    def __str__(self) -> str:
        if self.revision == DEFAULT_REVISION:
            return self.repo_id
        return f"{self.repo_id}@{self.revision}"

    @property
    def commit(self) -> str | None:
        """The revision when it is itself a commit."""
        return self.revision if is_commit(self.revision) else None


@dataclass(frozen=True)
class LocalName:
    """A folder of this box, by its absolute path."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


def is_commit(text: str) -> bool:
    """Whether the text is a full commit hash: 40 lower-case hex digits."""
    return _COMMIT.fullmatch(text) is not None


def parse_name(text: str, field: str = "model") -> HubName | LocalName:
    """Reads `org/name`, `org/name@revision` or an absolute path.

    Args:
        text: The name as a client sent it.
        field: What the error calls the text.

    Raises:
        InvalidNameError: The text is none of the three.
    """
    if not text:
        raise InvalidNameError(field, "is empty; give org/name, org/name@revision or a path")
    if text.startswith(_LOCAL_STARTS):
        return _local_name(text, field)
    repo_id, at, revision = text.partition("@")
    if at and not revision:
        raise InvalidNameError(field, "nothing follows the @; name a branch, tag or commit")
    try:
        return HubName(repo_id, revision if at else DEFAULT_REVISION)
    except InvalidNameError as error:
        raise InvalidNameError(field, error.problem) from None


def parse_name_or_path(text: str, field: str = "model") -> HubName | LocalName:
    """Like `parse_name`, for code that runs in the caller's own folder.

    A folder that exists wins over a repository of the same name; `~` and relative paths are
    made absolute.

    Raises:
        InvalidNameError: The text is neither a path nor a name.
    """
    if not text or _UNPRINTABLE.search(text) or len(text) > MAX_PATH_LENGTH:
        return parse_name(text, field)
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise InvalidNameError(field, "no such user's home directory") from None
    if text.startswith(_LOCAL_STARTS) or _is_folder(path):
        return LocalName(path.absolute())
    return parse_name(text, field)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # such as a name that is too long for a file
        return False


def _local_name(text: str, field: str) -> LocalName:
    if not text.startswith("/"):
        raise InvalidNameError(
            field,
            "a local path must be absolute, for the daemon runs in another folder; "
            "make it absolute (a name of the hub starts with a letter or a digit)",
        )
    if len(text) > MAX_PATH_LENGTH:
        raise InvalidNameError(field, f"the path is longer than {MAX_PATH_LENGTH} characters")
    if _UNPRINTABLE.search(text):
        raise InvalidNameError(field, "the path holds control characters")
    return LocalName(Path(text))


def _repo_id_problem(repo_id: str) -> str | None:
    if repo_id.count("/") > 1:
        return "a repository is org/name or name; a local path starts with /"
    if not all(_REPO_PART.fullmatch(part) for part in repo_id.split("/")):
        return (
            "a repository is org/name or name, each of 1 to 96 letters, digits, '-', '_' or '.', "
            "not starting or ending with '-' or '.'"
        )
    if "--" in repo_id or ".." in repo_id:
        return "a repository's name holds neither '--' nor '..'"
    if repo_id.endswith(".git"):
        return "a repository's name does not end in '.git'; leave it out"
    return None


def _revision_problem(revision: str) -> str | None:
    if len(revision) > MAX_REVISION_LENGTH:
        return f"the revision is longer than {MAX_REVISION_LENGTH} characters"
    if not all(_REVISION_PART.fullmatch(part) for part in revision.split("/")):
        return (
            "a revision is a branch, tag or commit: parts of letters, digits and '._-+=#@' "
            "between single slashes, none starting with '.' or '-'"
        )
    if ".." in revision or any(part.endswith((".lock", ".")) for part in revision.split("/")):
        return "a revision holds no '..', and no part of it ends in '.' or '.lock'"
    return None
