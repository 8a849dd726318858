"""Models of sizes that GPUs have kernels for, and whose weights are more than noise."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.hub.tiny_models import build_tiny_model


def build_model(folder: Path, *, layers: int) -> Path:
    """A Llama of some 15 million numbers a layer, with the tokenizer of the tiny one."""
    build_tiny_model(folder)
    config = AutoConfig.from_pretrained(
        folder,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.05,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder
