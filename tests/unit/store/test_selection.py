"""Which files are chosen, on listings like those of real repositories."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.errors import ModelUnsupportedError
from loaderd.server.store.cache import TreeEntry
from loaderd.server.store.plan import SkipReason
from loaderd.server.store.selection import find_weights, is_index, is_pickle, left_out, select


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
            [],
            "config.json generation_config.json generation_config_for_text_generation.json "
            "merges.txt model.safetensors tokenizer.json tokenizer_config.json vocab.json",
            id="gpt2",
        ),
        pytest.param(
            VARIANTS,
            [],
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
    names: list[str], shards: list[str], chosen: str
) -> None:
    weights = find_weights(names, "org/model", allow_pickle=False)
    assert is_index(weights) is bool(shards)
    assert select(names, {weights, *shards}) == chosen.split()


def test_one_file_wins_over_shards_as_in_transformers() -> None:
    names = ["model.safetensors", *LLAMA]
    assert find_weights(names, "org/model", allow_pickle=False) == "model.safetensors"
    chosen = select(names, {"model.safetensors"})
    assert not {"model.safetensors.index.json", *LLAMA_SHARDS} & set(chosen)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["config.json", "tf_model.h5"], "only safetensors and GGUF weights"),
        (["config.json", "weights.pt"], "only safetensors and GGUF weights"),
        (["config.json", "adapter_model.safetensors"], "neither model.safetensors nor listed"),
        (["config.json", "model.fp16.safetensors"], "neither model.safetensors nor listed"),
        (["config.json", "README.md"], "no safetensors weights"),
        (["config.json", "unet/model.safetensors"], "neither model.safetensors nor listed"),
    ],
)
def test_what_cannot_be_loaded_is_said(names: list[str], problem: str) -> None:
    for allow_pickle in (False, True):
        with pytest.raises(ModelUnsupportedError) as caught:
            find_weights(names, "org/model", allow_pickle=allow_pickle)
        assert problem in caught.value.problem


SINGLE = "model.safetensors"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def test_the_only_gguf_file_is_taken_where_there_is_nothing_else() -> None:
    weights = "model-q4_k_m.gguf"
    names = ["README.md", "config.json", weights, "tokenizer.json"]
    assert find_weights(names, "org/model", allow_pickle=False) == weights
    assert select(names, {weights}) == ["config.json", weights, "tokenizer.json"]
    assert find_weights([*names, SINGLE], "org/model", allow_pickle=False) == SINGLE
    assert find_weights([*names, PICKLE], "org/model", allow_pickle=True) == PICKLE


@pytest.mark.parametrize("count", [2, 10, 13])
def test_several_gguf_files_are_listed(count: int) -> None:
    names = [f"model-q{number:02}.gguf" for number in range(count)]
    with pytest.raises(ModelUnsupportedError) as caught:
        find_weights(names, "org/model", allow_pickle=False)
    assert ", ".join(names[:10]) in caught.value.problem
    assert ("and 3 more" in caught.value.problem) is (count == 13)


@pytest.mark.parametrize("names", [[PICKLE], [PICKLE_INDEX], [PICKLE, "model.fp16.safetensors"]])
def test_pickles_are_refused_with_the_way_to_allow_them(names: list[str]) -> None:
    with pytest.raises(ModelUnsupportedError) as caught:
        find_weights(names, "org/model", allow_pickle=False)
    assert "--allow-pickle org/model" in str(caught.value)
    assert find_weights(names, "org/model", allow_pickle=True) == names[0]


@pytest.mark.parametrize("names", [GPT2, VARIANTS, [*LLAMA, PICKLE, PICKLE_INDEX]])
def test_safetensors_are_taken_whatever_is_allowed(names: list[str]) -> None:
    for allow_pickle in (False, True):
        weights = find_weights(names, "org/model", allow_pickle=allow_pickle)
        assert weights.startswith("model.safetensors")
        assert not any(is_pickle(name) for name in select(names, {weights}))


def test_one_pickle_wins_over_shards_as_in_transformers() -> None:
    assert find_weights([PICKLE_INDEX, PICKLE], "org/model", allow_pickle=True) == PICKLE


def test_what_is_left_out_is_told_with_its_reason_and_the_largest_first() -> None:
    sizes = {
        "model.safetensors": 50,
        "config.json": 1,
        "pytorch_model.bin": 70,
        "pytorch_model.bin.index.json": 2,
        "original/consolidated.00.pth": 70,
        "tf_model.h5": 60,
        "onnx/model.onnx": 40,
        "model-q4_k_m.gguf": 30,
        "model.fp16.safetensors": 25,
        "model.safetensors.index.fp16.json": 3,
        "modeling_custom.py": 5,
        "README.md": 6,
        ".gitattributes": 4,
    }
    tree = {path: TreeEntry(size, "0" * 40) for path, size in sizes.items()}
    needed = select(tree, {"model.safetensors"})
    assert [(file.path, file.reason, file.size_bytes) for file in left_out(tree, needed)] == [
        ("original/consolidated.00.pth", SkipReason.PICKLE, 70),
        ("pytorch_model.bin", SkipReason.PICKLE, 70),
        ("tf_model.h5", SkipReason.OTHER_FORMAT, 60),
        ("onnx/model.onnx", SkipReason.OTHER_FORMAT, 40),
        ("model-q4_k_m.gguf", SkipReason.OTHER_FORMAT, 30),
        ("model.fp16.safetensors", SkipReason.OTHER_COPY, 25),
        ("README.md", SkipReason.NOT_NEEDED, 6),
        ("modeling_custom.py", SkipReason.CODE, 5),
        (".gitattributes", SkipReason.NOT_NEEDED, 4),
        ("model.safetensors.index.fp16.json", SkipReason.OTHER_COPY, 3),
        ("pytorch_model.bin.index.json", SkipReason.PICKLE, 2),
    ]


PATHS = st.sampled_from([*LLAMA, *MISTRAL, *GPT2, *VARIANTS, *QWEN, PICKLE]) | st.text(min_size=1)


@given(st.dictionaries(PATHS, st.integers(0, 1 << 40)), st.booleans())
def test_every_file_is_either_chosen_or_left_out(sizes: dict[str, int], allow: bool) -> None:
    tree = {path: TreeEntry(size, "0" * 40) for path, size in sizes.items()}
    try:
        weights = find_weights(tree, "org/model", allow_pickle=allow)
    except ModelUnsupportedError:
        return
    chosen = select(tree, {weights})
    skipped = [file.path for file in left_out(tree, chosen)]
    assert sorted(chosen + skipped) == sorted(tree)
    sizes_left_out = [file.size_bytes for file in left_out(tree, chosen)]
    assert sizes_left_out == sorted(sizes_left_out, reverse=True)
