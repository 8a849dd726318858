"""A tokenizer's files, without what would have transformers read others.

Keys of `tokenizer_config.json` and `special_tokens_map.json` become arguments of the tokenizer,
and some of those name files. A model's own files are found by their names, so no model needs such
a key; one with a path of its making could show any file of this user in its vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

_FILE_ARGUMENTS = frozenset({"vocab", "merges", "gguf_file", "tokenizer_object"})
_SPECIAL_TOKENS = ("_token", "additional_special_tokens", "extra_special_tokens")

_BEGIN_BYTES = 1 << 18
"""Of tokenizer.json, which has some megabytes; its added tokens stand there."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in a folder."""
    return any((folder / name).exists() for name in _TOKENIZERS)


def added_tokens(folder: Path) -> dict[int, AddedToken] | None:
    """The added tokens of tokenizer.json, by their ids, where no other file tells of them.

    transformers reads all of that file for them a second time, in Python, which takes as long as
    the tokenizer itself. They stand before what makes it large.

    Returns:
        None where transformers is to find them itself.
    """
    config = _settings(folder / "tokenizer_config.json")
    if config is None or "added_tokens_decoder" in config:
        return None
    if any((folder / name).exists() for name in ("special_tokens_map.json", "added_tokens.json")):
        return None
    try:
        with (folder / "tokenizer.json").open("rb") as file:
            begin = file.read(_BEGIN_BYTES).decode(errors="ignore")
        head, key, rest = begin.partition('"added_tokens"')
        json.loads(f"{head}{key}: null}}")  # fails unless it is a key of the outermost object
        value = rest.lstrip().removeprefix(":").lstrip()
        tokens, _ = json.JSONDecoder().raw_decode(value)
        return {token.pop("id"): AddedToken(**token) for token in tokens}
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None  # absent, or for transformers to refuse


@contextmanager
def without_foreign_files(folder: Path) -> Iterator[Path]:
    """The folder, or for the time of the block a view of it whose settings name no files."""
    safe = {
        name: kept
        for name, keeps in _KEEPS.items()
        if (kept := _filtered(folder / name, keeps)) is not None
    }
    if not safe:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as view:
        for path in folder.iterdir():
            if path.name not in safe:
                Path(view, path.name).symlink_to(path)
        for name, settings in safe.items():
            Path(view, name).write_text(json.dumps(settings))
        yield Path(view)


def _filtered(path: Path, keeps: Callable[[str], bool]) -> dict[str, Any] | None:
    """The settings that are kept; None when that is all of them, or there are none."""
    settings = _settings(path)
    if settings is None or all(map(keeps, settings)):
        return None
    return {key: value for key, value in settings.items() if keeps(key)}


def _settings(path: Path) -> dict[str, Any] | None:
    """What a file sets; None where it is absent, or for transformers to refuse."""
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _is_no_file(key: str) -> bool:
    return key not in _FILE_ARGUMENTS and not key.endswith("_file")


def _is_special_token(key: str) -> bool:
    return key.endswith(_SPECIAL_TOKENS)


_KEEPS: dict[str, Callable[[str], bool]] = {
    "tokenizer_config.json": _is_no_file,
    "special_tokens_map.json": _is_special_token,
}
"""By file, which of its keys stay."""
