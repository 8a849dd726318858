"""Which files of a repository loading needs. Pure: lists of names in, lists of names out.

A repository often holds the same weights several times: as pickles, for other frameworks, in
half precision, in its author's own layout. Loading takes one copy, the one that transformers
takes: `model.safetensors`, or else the shards that `model.safetensors.index.json` names.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from loaderd.server.errors import ModelUnsupportedError

CONFIG = "config.json"
SINGLE_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"

# Configuration, tokenizers and chat templates; transformers reads them by many names.
_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
# Indexes of other copies: pytorch_model.bin.index.json, model.safetensors.index.fp16.json.
_INDEX = re.compile(r".*\.index(\.[^./]+)?\.json")
_OTHER_FORMATS = (
    ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth",
)  # fmt: skip


def weights_index(names: Collection[str], model: str) -> str | None:
    """The index that says which files hold the weights; None when one file holds them all.

    Raises:
        ModelUnsupportedError: There are no weights that can be loaded.
    """
    if SINGLE_WEIGHTS in names:
        return None
    if WEIGHTS_INDEX in names:
        return WEIGHTS_INDEX
    if any(name.endswith(".safetensors") for name in names):
        problem = f"its weights are neither {SINGLE_WEIGHTS} nor listed in {WEIGHTS_INDEX}"
    elif has_weights(names):
        problem = "only safetensors weights are loaded, and it has others"
    else:
        problem = "it has no safetensors weights"
    raise ModelUnsupportedError(model, problem)


def has_weights(names: Collection[str]) -> bool:
    """Whether any of the files looks like weights, of whatever format."""
    return any(name.endswith((".safetensors", *_OTHER_FORMATS)) for name in names)


def select(names: Collection[str], shards: Collection[str] | None) -> list[str]:
    """The files that loading needs, sorted.

    Args:
        names: All files of the repository, as paths from its root.
        shards: What the index names; None when one file holds the weights.
    """
    weights = {SINGLE_WEIGHTS} if shards is None else {WEIGHTS_INDEX, *shards}
    return sorted(weights.union(name for name in names if _is_small_part(name)))


def _is_small_part(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    if folder == CHAT_TEMPLATE_FOLDER:
        return base.endswith(".jinja")
    return not folder and base.endswith(_SMALL_SUFFIXES) and not _INDEX.fullmatch(base)
