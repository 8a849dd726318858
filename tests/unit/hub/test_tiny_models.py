"""The tiny models are what transformers expects of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub.tiny_models import ARCHITECTURES, build_tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: build_tiny_model(root / name, architecture=name) for name in ARCHITECTURES}


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_loads_and_generates(folders: dict[str, Path], architecture: str) -> None:
    model, tokenizer = load(folders[architecture])
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    tokens = output[0, -24:].tolist()
    # A model that says one thing again and again could not tell a right cache from a wrong one.
    assert len(set(tokens)) > 4


def test_any_text_survives_its_tokenizer(folders: dict[str, Path]) -> None:
    _, tokenizer = load(folders["llama"])
    text = "  two  spaces\n\tna\u00efve \u65e5\u672c \U0001f642\x00 don't <|other|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("a<|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id


def test_one_seed_gives_one_model_and_another_seed_another(tmp_path: Path) -> None:
    first, again, other = (
        (build_tiny_model(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert first != other


def test_shards_have_an_index_and_the_same_weights(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    folder = build_tiny_model(tmp_path / "sharded", max_shard_size="100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert shards == {path.name for path in folder.glob("*.safetensors")}
    sharded, whole = load(folder)[0].state_dict(), load(folders["llama"])[0].state_dict()
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_a_folder_that_is_there_is_taken_as_it_is(folders: dict[str, Path]) -> None:
    before = (folders["llama"] / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_model(folders["llama"], seed=99) == folders["llama"]
    assert (folders["llama"] / "model.safetensors").stat().st_mtime_ns == before
