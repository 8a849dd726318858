"""A tiny model as a GGUF file, written as llama.cpp's converter writes a Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMAL, _CONTROL = 1, 3


def write_tiny_gguf(model: Path, path: Path) -> Path:
    """Writes a Llama with tied embeddings, its matrices in blocks of Q8_0.

    Args:
        model: Its folder, as `build_tiny_model` makes it.
        path: The file to write.
    """
    import gguf

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, model, config)
    for name, numbers in _tensors(model, config):
        if numbers.ndim == 1:
            writer.add_tensor(name, numbers)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, model: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    template = model / "chat_template.jinja"
    writer.add_chat_template(template.read_text())


def _tensors(model: Path, config: dict[str, Any]) -> list[tuple[str, Any]]:
    from safetensors.numpy import load_file

    weights = load_file(model / "model.safetensors")
    tensors = [
        ("token_embd.weight", weights["model.embed_tokens.weight"]),
        ("output_norm.weight", weights["model.norm.weight"]),
    ]
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in _LAYER.items():
            numbers = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in heads:  # ggml rotates pairs of neighbours, transformers two halves
                rows, columns = numbers.shape
                halves = numbers.reshape(heads[ours], 2, rows // heads[ours] // 2, columns)
                numbers = halves.swapaxes(1, 2).reshape(rows, columns)
            tensors.append((f"blk.{layer}.{ours}.weight", numbers))
    return tensors
