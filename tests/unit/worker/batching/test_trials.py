"""What trying a model brought is remembered, and only as long as it holds."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from loaderd.server.worker.engine.batching import suitability, trials
from loaderd.server.worker.engine.batching.caches import cache_folder
from loaderd.server.worker.engine.batching.kernels import Form, LinearPolicy
from loaderd.server.worker.engine.batching.trials import (
    Outcome,
    Trials,
    Way,
    identity_of,
)
from tests.unit.worker.engine_client import Client, build, reference

OUTCOME = Outcome(
    {"cuda:0": 64, "cpu": 8},
    {0: None, 1: 8},
    has_kernels=True,
    way=Way.NATIVE,
    linears=LinearPolicy(Form.PACKED, Form.REORDERED),
)
DAMAGES: list[dict[str, Any]] = [
    {"bytes_per_token": 64},
    {"bytes_per_token": {}},
    {"bytes_per_token": {"cpu": 0}},
    {"windows": []},
    {"windows": {"0": "far"}},
    {"windows": {"a": 1}},
    {"linears": {"few": "magic", "many": "own"}},
]
SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "mistral": {
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
    },
}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "ignore_eos": True}


def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are tried from now on."""
    models = []
    own_logits = suitability._own_logits

    def trying(model: Any, prompt: list[int]) -> Any:
        models.append(model)
        return own_logits(model, prompt)

    monkeypatch.setattr(suitability, "_own_logits", trying)
    return models


@pytest.mark.parametrize("architecture", SIZES)
def test_a_model_is_tried_once(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tried(monkeypatch)
    sizes = SIZES[architecture]
    expected = reference(
        build(architecture, **sizes), do_sample=False, max_new_tokens=8, eos_token_id=None
    )
    reasons = []
    for _ in range(2):
        client = Client(build(architecture, **sizes), "batching", trials=Trials(tmp_path))
        assert client.token_ids(**GREEDY) == expected
        reasons.append(client.reason.partition(";")[0])  # what follows is timed at each load
        client.engine.close()
    assert len({id(model) for model in models}) == 1
    assert reasons[0] == reasons[1]


def test_another_configuration_is_another_model(tmp_path: Path) -> None:
    one = identity_of(build("llama"))
    assert one == identity_of(build("llama"))
    assert one != identity_of(build("llama", rms_norm_eps=1e-3))
    assert one != identity_of(build("llama").to(torch.bfloat16))
    compiled = [identity_of(build("llama"), kernels) for kernels in ("of gcc", "of clang")]
    assert len({one, *compiled}) == 3


def test_what_other_code_brought_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = identity_of(model)
    monkeypatch.setattr(trials, "_code", lambda: "other")
    assert identity_of(model) != before


def test_outcomes_are_kept(tmp_path: Path) -> None:
    notes = Trials(tmp_path / "new" / "folder")
    assert notes.find("a") is None
    notes.keep("a", OUTCOME)
    assert notes.find("a") == OUTCOME
    assert notes.find("b") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        *(json.dumps(asdict(OUTCOME) | damage).encode() for damage in DAMAGES),
    ],
)
def test_a_damaged_note_is_no_note(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    notes = Trials(tmp_path)
    assert notes.find("a") is None
    notes.keep("a", OUTCOME)
    assert notes.find("a") == OUTCOME


def test_a_disk_that_takes_nothing_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    notes = Trials(tmp_path / "file" / "folder")
    notes.keep("a", OUTCOME)
    assert notes.find("a") is None


def test_the_oldest_notes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_MOST", 3)
    notes = Trials(tmp_path)
    for number in range(5):
        notes.keep(str(number), OUTCOME)
        os.utime(tmp_path / f"{number}.json", (number, number))
    notes.keep("5", OUTCOME)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["3", "4", "5"]


def test_they_are_below_the_users_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder("trials") == Path("/caches/loaderd/trials")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_folder("trials") == Path("/home/ada/.cache/loaderd/trials")
