"""Which files of a repository loading needs. Pure: lists of names in, lists of names out.

A repository often holds the same weights several times: as pickles, for other frameworks, in
half precision, in its author's own layout. Loading takes one copy, the one that transformers
takes: `model.safetensors`, or else the shards that `model.safetensors.index.json` names. Where
there is neither and the operator allows pickles, `pytorch_model.bin` or its shards. Where there is
nothing of these, the only GGUF file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from loaderd.server.errors import ModelUnsupportedError
from loaderd.server.store.cache import TreeEntry
from loaderd.server.store.plan import SkippedFile, SkipReason

CONFIG = "config.json"
SINGLE_WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
GGUF = ".gguf"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"

_MOST_SHOWN = 10

_INDEX_SUFFIX = ".index.json"
_SAFETENSORS = (SINGLE_WEIGHTS, SINGLE_WEIGHTS + _INDEX_SUFFIX)
_PICKLES = (PICKLED_WEIGHTS, PICKLED_WEIGHTS + _INDEX_SUFFIX)

# Configuration, tokenizers and chat templates; transformers reads them by many names.
_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
# Indexes of other copies: pytorch_model.bin.index.json, model.safetensors.index.fp16.json.
_INDEX = re.compile(r"(.*)\.index(\.[^./]+)?\.json")
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_OTHER_FORMATS = (
    GGUF, ".h5", ".llamafile", ".mlmodel", ".msgpack", ".npz", ".onnx", ".onnx_data", ".ot",
    ".pb", ".tflite",
)  # fmt: skip


def find_weights(names: Collection[str], model: str, *, allow_pickle: bool) -> str:
    """The file that holds the weights, or the index of those that do.

    Args:
        names: All files of the repository.
        model: The model, for the error.
        allow_pickle: Take pickles when there are no safetensors.

    Raises:
        ModelUnsupportedError: There are no weights that can be loaded.
    """
    for file in _SAFETENSORS + (_PICKLES if allow_pickle else ()):
        if file in names:
            return file
    ggufs = sorted(filter(is_gguf, names))
    if len(ggufs) == 1 and not any(name.endswith(".safetensors") for name in names):
        return ggufs[0]
    if any(name in names for name in _PICKLES):
        problem = (
            "it has no safetensors weights but pickles, which can hold code; to load those, start "
            f"the daemon with --allow-pickle {model}"
        )
    elif any(name.endswith(".safetensors") for name in names):
        problem = f"its weights are neither {_SAFETENSORS[0]} nor listed in {_SAFETENSORS[1]}"
    elif ggufs:
        problem = _several(ggufs)
    elif has_weights(names):
        problem = "only safetensors and GGUF weights are loaded, and it has others"
    else:
        problem = "it has no safetensors weights"
    raise ModelUnsupportedError(model, problem)


def is_index(file: str) -> bool:
    """Whether what `find_weights` found is an index."""
    return file.endswith(_INDEX_SUFFIX)


def is_gguf(file: str) -> bool:
    """Whether a file is a GGUF file, by its name."""
    return file.endswith(GGUF)


def is_pickle(file: str) -> bool:
    """Whether a file is a pickle, or the index of some."""
    return _without_index(file).endswith(_PICKLE_SUFFIXES)


def has_weights(names: Collection[str]) -> bool:
    """Whether any of the files looks like weights, of whatever format."""
    suffixes = (".safetensors", *_PICKLE_SUFFIXES, *_OTHER_FORMATS)
    return any(name.endswith(suffixes) for name in names)


def select(names: Collection[str], weights: Collection[str]) -> list[str]:
    """The files that loading needs, sorted.

    Args:
        names: All files of the repository, as paths from its root.
        weights: Those that hold the weights, and their index if there is one.
    """
    return sorted({*weights, *(name for name in names if _is_small_part(name))})


def left_out(tree: Mapping[str, TreeEntry], needed: Collection[str]) -> tuple[SkippedFile, ...]:
    """The files of a listing that are not needed, the largest first, and why."""
    skipped = (
        SkippedFile(path, entry.size, _skip_reason(path))
        for path, entry in tree.items()
        if path not in needed
    )
    return tuple(sorted(skipped, key=lambda file: (-file.size_bytes, file.path)))


def _skip_reason(path: str) -> SkipReason:
    path = _without_index(path)
    if path.endswith(".safetensors"):
        return SkipReason.OTHER_COPY
    if path.endswith(_PICKLE_SUFFIXES):
        return SkipReason.PICKLE
    if path.endswith(_OTHER_FORMATS):
        return SkipReason.OTHER_FORMAT
    return SkipReason.CODE if path.endswith(".py") else SkipReason.NOT_NEEDED


def _several(ggufs: list[str]) -> str:
    shown = ", ".join(ggufs[:_MOST_SHOWN])
    rest = f" and {len(ggufs) - _MOST_SHOWN} more" if len(ggufs) > _MOST_SHOWN else ""
    return (
        f"it has several GGUF files ({shown}{rest}), and which one is meant is not clear; "
        "name the path of one that is on this box"
    )


def _without_index(path: str) -> str:
    """The weights' file that an index stands for; any other path as it is."""
    match = _INDEX.fullmatch(path)
    return match[1] if match else path


def _is_small_part(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    if folder == CHAT_TEMPLATE_FOLDER:
        return base.endswith(".jinja")
    return not folder and base.endswith(_SMALL_SUFFIXES) and not _INDEX.fullmatch(base)
