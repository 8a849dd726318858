"""What a model's tokenizer settings can make transformers read: nothing outside its folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loaderd.server.errors import LoaderdError
from loaderd.server.worker.loader import ModelLoader
from loaderd.server.worker.tokenizer_files import added_tokens, without_foreign_files
from tests.hub.tiny_models import build_tiny_model

SECRET = "hf_secretsecretsecret"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "model")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{SECRET}\nline two\n")
    return path


@pytest.mark.parametrize(
    ("config", "special"),
    [
        ({"tokenizer_class": "BertTokenizer", "vocab": "SECRET"}, None),
        ({"tokenizer_class": "BertTokenizerLegacy"}, {"vocab_file": "SECRET"}),
        ({}, {"tokenizer_file": "SECRET"}),
        ({"vocab_file": "SECRET", "merges_file": "SECRET", "gguf_file": "SECRET"}, None),
    ],
)
def test_a_file_outside_never_gets_into_the_vocabulary(
    folder: Path, secret: Path, config: dict[str, str], special: dict[str, str] | None
) -> None:
    def with_path(settings: dict[str, str]) -> dict[str, str]:
        return {k: str(secret) if v == "SECRET" else v for k, v in settings.items()}

    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | with_path(config)))
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(with_path(special)))
    if "Bert" in config.get("tokenizer_class", ""):
        (folder / "tokenizer.json").unlink()
    try:
        tokenizer = ModelLoader(str(folder)).load_tokenizer()
    except LoaderdError:
        return  # refused is right as well
    assert SECRET not in " ".join(tokenizer.get_vocab())
    assert SECRET not in tokenizer.decode(list(range(min(100, len(tokenizer)))))


def test_a_folder_that_names_no_files_is_used_as_it_is(folder: Path) -> None:
    with without_foreign_files(folder) as view:
        assert view == folder


def test_what_is_no_file_stays(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"special_tokens_map_file": "/home/x/map.json"}))
    with without_foreign_files(folder) as view:
        assert view != folder
        assert json.loads((view / "tokenizer_config.json").read_text()) == settings
        assert {each.name for each in view.iterdir()} == {each.name for each in folder.iterdir()}
    assert not view.exists()
    text = "The sky is blue."
    tokenizer = ModelLoader(str(folder)).load_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def changed(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "token",
    [
        {"content": "<own>", "special": True},
        {"content": "own word", "special": False, "lstrip": True, "single_word": True},
        None,
    ],
)
def test_added_tokens_that_are_given_make_the_same_tokenizer(
    folder: Path, token: dict[str, Any] | None
) -> None:
    if token is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        token = {
            "normalized": False,
            "rstrip": False,
            "lstrip": False,
            "single_word": False,
        } | token
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        changed(path, added_tokens=[*content["added_tokens"], {"id": len(tokenizer), **token}])
    given = added_tokens(folder)
    assert given is not None
    ours = ModelLoader(str(folder)).load_tokenizer()
    theirs = AutoTokenizer.from_pretrained(folder)
    assert repr(ours.added_tokens_decoder) == repr(theirs.added_tokens_decoder) == repr(given)
    assert ours.all_special_ids == theirs.all_special_ids
    for text in ("one two", "a <own> own word b", "<|im_start|>x<|im_end|>"):
        assert ours(text).input_ids == theirs(text).input_ids
        ids = theirs(text).input_ids
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_where_other_files_tell_of_added_tokens_none_are_given(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert added_tokens(folder) is None


def test_settings_that_have_the_added_tokens_stay(folder: Path) -> None:
    changed(folder / "tokenizer_config.json", added_tokens_decoder={})
    assert added_tokens(folder) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"added_tokens"',
        '{"added_tokens": [{"id": 1, "content": "x"}, ',
        '{"truncation": {"added_tokens": []}, "added_tokens": []}',
        '{"version": "\\"added_tokens\\": []"}',
        '{"added_tokens": [{"content": "x"}]}',
        '{"added_tokens": {"id": 1}}',
    ],
)
def test_what_is_not_as_it_should_be_is_left_to_transformers(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert added_tokens(folder) is None
