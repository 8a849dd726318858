"""The tokenizer that is in a GGUF file."""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loaderd.server.worker.weight_files import WeightFiles


def gguf_tokenizer(weights: WeightFiles) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a GGUF file.

    The file names its way to split text instead of describing it, and transformers takes GPT-2's
    for names that it does not know.

    Args:
        weights: The file.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        weights.folder, gguf_file=weights.gguf_file, trust_remote_code=False, local_files_only=True
    )
    split = _SPLITS.get(weights.gguf_header.pre_tokenizer)
    if split is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer


_SPLITS: dict[str, Any] = {
    # Every digit for itself first, which changes the tokens of spaces before a number.
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}
"""Those that transformers lacks, by their names in GGUF files."""
