"""Tiny models with random weights, whole in every other way: config, tokenizer, chat template.

They load and generate in milliseconds. Nothing heavy is imported before one is built, and a
folder that is there is taken as it is, so a session's tests can share one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

END_OF_TURN = "<|im_end|>"
START_OF_TURN = "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT_LENGTH = 256

# What each architecture needs beyond the common sizes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"intermediate_size": 96, "num_key_value_heads": 2, "sliding_window": 16},
    "gpt2": {"n_inner": 96},
}

_CORPUS = [
    "The sky is blue because the air scatters blue light more than red light.",
    "A model host loads a model once, and every client asks it for tokens.",
    "def main() -> None:\n    print('Hello, world')\n",
    "0 1 2 3 4 5 6 7 8 9, and then the numbers go on: 10, 11, 12.",
]


def build_tiny_model(
    folder: Path, *, architecture: str = "llama", seed: int = 0, max_shard_size: str = "1GB"
) -> Path:
    """Builds the model unless `folder` exists, and returns the folder.

    Args:
        folder: Appears whole or not at all.
        architecture: A key of `ARCHITECTURES`.
        seed: Of the weights; two models with one seed are equal.
        max_shard_size: Such as "50KB" for several safetensors files with an index.
    """
    if folder.exists():
        return folder

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = _tokenizer()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        # Ten times the usual, so that the next token depends on the text.
        initializer_range=0.2,
        **ids,
        **ARCHITECTURES[architecture],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**ids)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
        staged = Path(scratch) / folder.name
        model.save_pretrained(staged, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(staged)
        staged.rename(folder)
    return folder


def _tokenizer() -> Any:
    """A byte-level BPE tokenizer: every text has tokens, and decoding gives it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[START_OF_TURN, END_OF_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_OF_TURN,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TURN,
        model_max_length=CONTEXT_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )
