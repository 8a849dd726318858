"""Which files are chosen, on listings like those of real repositories."""

from __future__ import annotations

import pytest

from loaderd.server.errors import ModelUnsupportedError
from loaderd.server.store.selection import select, weights_index


def _listing(names: str) -> list[str]:
    return names.split()


LLAMA = _listing("""
.gitattributes LICENSE.txt README.md USE_POLICY.md config.json generation_config.json
model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json
original/consolidated.00.pth original/params.json original/tokenizer.model
special_tokens_map.json tokenizer.json tokenizer_config.json
""")
LLAMA_SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]

MISTRAL = _listing("""
.gitattributes README.md SYSTEM_PROMPT.txt chat_template.jinja config.json
consolidated-00001-of-00002.safetensors consolidated-00002-of-00002.safetensors
consolidated.safetensors consolidated.safetensors.index.json generation_config.json
model-00001-of-00001.safetensors model.safetensors.index.json params.json
additional_chat_templates/rag.jinja additional_chat_templates/readme.md tekken.json
tokenizer.model tokenizer.model.v3 tokenizer_config.json
""")

GPT2 = _listing("""
.gitattributes 64-8bits.tflite 64.tflite README.md config.json flax_model.msgpack
generation_config.json generation_config_for_text_generation.json merges.txt model.safetensors
onnx/config.json onnx/decoder_model.onnx onnx/tokenizer.json pytorch_model.bin rust_model.ot
tf_model.h5 tokenizer.json tokenizer_config.json vocab.json
""")

VARIANTS = _listing("""
config.json model.fp16.safetensors model.fp16-00001-of-00002.safetensors
model.safetensors.index.fp16.json model.safetensors pytorch_model.bin
pytorch_model.bin.index.json spiece.model preview.png tokenizer.json training_args.bin
""")

QWEN = _listing("""
config.json merges.txt model.safetensors-00001-of-00002.safetensors
model.safetensors-00002-of-00002.safetensors model.safetensors.index.json model-q4_k_m.gguf
tokenizer.json tokenizer_config.json vocab.json
""")
QWEN_SHARDS = [
    "model.safetensors-00001-of-00002.safetensors",
    "model.safetensors-00002-of-00002.safetensors",
]


@pytest.mark.parametrize(
    ("names", "shards", "chosen"),
    [
        pytest.param(
            LLAMA,
            LLAMA_SHARDS,
            "LICENSE.txt config.json generation_config.json model-00001-of-00002.safetensors "
            "model-00002-of-00002.safetensors model.safetensors.index.json "
            "special_tokens_map.json tokenizer.json tokenizer_config.json",
            id="llama",
        ),
        pytest.param(
            MISTRAL,
            ["model-00001-of-00001.safetensors"],
            "SYSTEM_PROMPT.txt additional_chat_templates/rag.jinja chat_template.jinja config.json "
            "generation_config.json model-00001-of-00001.safetensors model.safetensors.index.json "
            "params.json tekken.json tokenizer.model tokenizer_config.json",
            id="mistral",
        ),
        pytest.param(
            GPT2,
            None,
            "config.json generation_config.json generation_config_for_text_generation.json "
            "merges.txt model.safetensors tokenizer.json tokenizer_config.json vocab.json",
            id="gpt2",
        ),
        pytest.param(
            VARIANTS,
            None,
            "config.json model.safetensors spiece.model tokenizer.json",
            id="variants",
        ),
        pytest.param(
            QWEN,
            QWEN_SHARDS,
            "config.json merges.txt model.safetensors-00001-of-00002.safetensors "
            "model.safetensors-00002-of-00002.safetensors model.safetensors.index.json "
            "tokenizer.json tokenizer_config.json vocab.json",
            id="qwen",
        ),
    ],
)
def test_loading_needs_one_copy_of_the_weights_and_the_small_files(
    names: list[str], shards: list[str] | None, chosen: str
) -> None:
    is_sharded = weights_index(names, "org/model") is not None
    assert is_sharded is (shards is not None)
    assert select(names, shards) == chosen.split()


def test_one_file_wins_over_shards_as_in_transformers() -> None:
    names = ["model.safetensors", *LLAMA]
    assert weights_index(names, "org/model") is None
    assert not {"model.safetensors.index.json", *LLAMA_SHARDS} & set(select(names, None))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["config.json", "pytorch_model.bin"], "only safetensors weights are loaded"),
        (["config.json", "model-q4_k_m.gguf"], "only safetensors weights are loaded"),
        (["config.json", "adapter_model.safetensors"], "neither model.safetensors nor listed"),
        (["config.json", "model.fp16.safetensors"], "neither model.safetensors nor listed"),
        (["config.json", "README.md"], "no safetensors weights"),
        (["config.json", "unet/model.safetensors"], "neither model.safetensors nor listed"),
    ],
)
def test_what_cannot_be_loaded_is_said(names: list[str], problem: str) -> None:
    with pytest.raises(ModelUnsupportedError) as caught:
        weights_index(names, "org/model")
    assert problem in caught.value.problem
