import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from loaderd.server.errors import (
    DeviceMemoryError,
    InternalError,
    InvalidArgumentError,
    InvalidNameError,
    ModelNotFoundError,
    ModelUnsupportedError,
    OfflineNotCachedError,
    SnapshotCorruptError,
    SnapshotIncompleteError,
    UnsupportedOptionError,
)
from loaderd.server.worker import devices
from loaderd.server.worker.loader import ModelLoader
from tests.hub import Hub, HubRepo, files_below
from tests.hub.tiny_models import build_tiny_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD, NEW = "0" * 40, "f" * 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sharded"
    return build_tiny_model(folder, max_shard_size="100KB")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A model that the test may break."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def copy_of_sharded(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded, tmp_path / "sharded")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def cache(tmp_path: Path, tiny: Path, other: Path) -> Path:
    """A cache with two commits of one repository; `main` is the one that sorts last."""
    root = tmp_path / "hf" / "hub"
    repo = root / "models--org--name"
    for commit, source in ((OLD, other), (NEW, tiny)):
        shutil.copytree(source, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(NEW)
    (repo / "refs" / "v1").write_text(OLD)
    return root


def weights_of(loader: ModelLoader) -> torch.Tensor:
    weights: torch.Tensor = loader.load_model().get_input_embeddings().weight
    return weights.cpu()


def stored(folder: Path) -> torch.Tensor:
    tensor: torch.Tensor = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    return tensor.to(torch.float16)


def edit_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def test_a_local_folder_in_the_first_designs_way(tiny: Path) -> None:
    loader = ModelLoader(str(tiny))
    model = loader.load_model()
    assert model.dtype == torch.float16
    assert model.device.type == (
        "cpu" if not torch.accelerator.is_available() else model.device.type
    )
    assert not model.training
    tokenizer = loader.load_tokenizer()
    assert tokenizer.decode(tokenizer.encode("The sky")) == "The sky"


def test_a_folder_relative_to_the_current_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    assert torch.equal(weights_of(ModelLoader(f"./{tiny.name}")), stored(tiny))
    assert torch.equal(weights_of(ModelLoader(tiny.name)), stored(tiny))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_as_asked(tiny: Path, dtype: torch.dtype) -> None:
    assert ModelLoader(str(tiny), dtype=dtype, device_map="cpu").load_model().dtype == dtype


def test_a_model_in_shards(sharded: Path) -> None:
    assert (sharded / INDEX).exists()
    assert ModelLoader(str(sharded)).load_model().num_parameters() > 0


def test_the_pad_token_falls_back_to_the_end_of_sequence(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    assert settings.pop("pad_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = ModelLoader(str(copy)).load_tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_truncation_and_padding_of_the_file_are_switched_off(copy: Path) -> None:
    data = json.loads((copy / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (copy / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = ModelLoader(str(copy)).load_tokenizer()
    assert len(tokenizer.encode("The sky is blue because")) > 2
    assert tokenizer.backend_tokenizer.truncation is None


def test_the_cached_snapshot_is_what_the_ref_says(cache: Path, tiny: Path, other: Path) -> None:
    assert torch.equal(weights_of(ModelLoader("org/name")), stored(tiny))
    assert torch.equal(weights_of(ModelLoader("org/name@v1")), stored(other))
    assert torch.equal(weights_of(ModelLoader(f"org/name@{OLD}")), stored(other))
    (cache / "models--org--name" / "refs" / "main").write_text(OLD)
    assert torch.equal(weights_of(ModelLoader("org/name", cache_dir=cache)), stored(other))


def test_a_local_folder_wins_over_the_cache(
    cache: Path, other: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(other, tmp_path / "work" / "org" / "name")
    monkeypatch.chdir(tmp_path / "work")
    assert torch.equal(weights_of(ModelLoader("org/name")), stored(other))


def test_offline_and_not_cached(tmp_path: Path) -> None:
    with pytest.raises(OfflineNotCachedError):
        ModelLoader("org/absent", cache_dir=tmp_path / "no-such-cache").load_model()


def test_offline_a_damaged_snapshot_says_what_is_wrong(cache: Path) -> None:
    (cache / "models--org--name" / "snapshots" / NEW / WEIGHTS).unlink()
    with pytest.raises(SnapshotIncompleteError, match=WEIGHTS):
        ModelLoader("org/name").load_model()


DOWNLOAD = """
from loaderd.server.errors import ModelNotFoundError
from loaderd.server.worker.loader import ModelLoader

first, again = ModelLoader("org/fresh"), ModelLoader("org/fresh@main")
weights = [loader.load_model().get_input_embeddings().weight for loader in (first, again)]
assert (weights[0] == weights[1]).all()
assert again.load_tokenizer().eos_token == "<|im_end|>"
try:
    ModelLoader("org/absent").load_model()
except ModelNotFoundError as error:
    assert error.model == "org/absent"
else:
    raise AssertionError("the hub has no such model")
"""


def test_what_is_not_cached_is_downloaded_once(tiny: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub library reads its environment at import."""
    repo = HubRepo("org/fresh")
    repo.commit(files_below(tiny))
    with Hub(repo) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        subprocess.run([sys.executable, "-c", DOWNLOAD], env=environment, check=True, timeout=120)
        fetched = [r.path for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]
    assert sorted(set(fetched)) == sorted(fetched)
    assert any(path.endswith(WEIGHTS) for path in fetched)
    assert (tmp_path / "home" / "hub" / "models--org--fresh").is_dir()


@pytest.mark.parametrize("name", ["", "a/b/c", "org/name@", "org/na me", "org/..", "a@b\n"])
def test_malformed_names(name: str) -> None:
    with pytest.raises(InvalidNameError):
        ModelLoader(name).load_model()


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ModelNotFoundError):
        ModelLoader("/no/such/folder").load_model()


def flip(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[9:12] = b"\xff\xff\xff"
        (folder / file).write_bytes(data)

    return damage


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def shrink(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].clone()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip(WEIGHTS), "header"),
        (truncate, "bytes"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "header"),
        (rewrite(lambda tensors: tensors.__delitem__("model.norm.weight")), "model.norm.weight"),
        (rewrite(shrink), "model.norm.weight"),
    ],
)
def test_damaged_weights_never_load(
    copy: Path, damage: Callable[[Path], Any], expected: str
) -> None:
    damage(copy)
    with pytest.raises(SnapshotCorruptError) as caught:
        ModelLoader(str(copy), shown_name="org/name").load_model()
    assert (caught.value.model, caught.value.file) == ("org/name", WEIGHTS)
    assert expected in caught.value.expected
    assert str(copy) not in str(caught.value)


def test_tensors_that_the_model_does_not_know_are_no_fault(copy: Path) -> None:
    rewrite(lambda tensors: tensors.update({"extra": torch.zeros(2)}))(copy)
    assert ModelLoader(str(copy)).load_model().num_parameters() > 0


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_leads_out_of_the_folder_is_refused(copy_of_sharded: Path, name: str) -> None:
    index = json.loads((copy_of_sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (copy_of_sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(SnapshotCorruptError) as caught:
        ModelLoader(str(copy_of_sharded)).load_model()
    assert caught.value.file == INDEX


def test_a_missing_shard_is_named(copy_of_sharded: Path) -> None:
    shard = sorted(copy_of_sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SnapshotIncompleteError) as caught:
        ModelLoader(str(copy_of_sharded)).load_model()
    assert caught.value.file == shard.name


def test_a_folder_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(SnapshotIncompleteError, match=r"config\.json"):
        ModelLoader(str(copy)).load_model()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: edit_config(f, model_type="no_such_type"), "does not know its model_type"),
        (lambda f: edit_config(f, model_type="vit"), "not a causal language model"),
        (
            lambda f: edit_config(
                f, model_type="custom", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"}
            ),
            "does not know its model_type",
        ),
        (lambda f: (f / "config.json").write_text("{"), "names no model_type"),
        (lambda f: edit_config(f, hidden_size="many"), "does not fit its model_type"),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter"),
    ],
)
def test_what_cannot_be_served_says_why(
    copy: Path, change: Callable[[Path], Any], problem: str
) -> None:
    change(copy)
    with pytest.raises(ModelUnsupportedError) as caught:
        ModelLoader(str(copy), shown_name="org/name").load_model()
    assert problem in caught.value.problem
    assert str(copy) not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: (f / "tokenizer.json").write_text("{}"),
        lambda f: (f / "tokenizer_config.json").write_text("["),
    ],
)
def test_a_tokenizer_that_cannot_be_read(copy: Path, change: Callable[[Path], Any]) -> None:
    change(copy)
    with pytest.raises(ModelUnsupportedError, match="tokenizer"):
        ModelLoader(str(copy)).load_tokenizer()


def test_no_code_of_a_model_is_run(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (copy / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit_config(copy, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(f"open({str(mark)!r}, 'w')\n")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["code.T", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    loader = ModelLoader(str(copy))
    assert type(loader.load_model()).__module__.startswith("transformers.")
    assert type(loader.load_tokenizer()).__module__.startswith("transformers.")
    assert not mark.exists()


def test_the_config_does_not_choose_the_attention(copy: Path) -> None:
    edit_config(copy, attn_implementation="evil/kernels", _attn_implementation="evil/kernels")
    assert ModelLoader(str(copy)).load_model().config._attn_implementation == "sdpa"


def test_a_class_without_sdpa_attends_eagerly(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=30, hidden_size=8, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    assert not ModelLoader(str(tmp_path / "m")).load_model()._supports_sdpa


@pytest.mark.parametrize("device_map", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "disk", "balance"])
def test_a_malformed_device_map(tiny: Path, device_map: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"options\.device_map"):
        ModelLoader(str(tiny), device_map=device_map).load_model()


@pytest.mark.parametrize("device_map", ["cuda:99", "mps:99", "xpu:99"])
def test_a_device_that_the_box_lacks(tiny: Path, device_map: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=device_map):
        ModelLoader(str(tiny), device_map=device_map).load_model()


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    tiny: Path, device_map: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * ModelLoader(str(tiny)).load_model().num_parameters()
    monkeypatch.setattr(devices, "free_bytes", lambda _: needed - 1)
    with pytest.raises(DeviceMemoryError):
        ModelLoader(str(tiny), device_map=device_map).load_model()
    monkeypatch.setattr(devices, "free_bytes", lambda _: needed)
    ModelLoader(str(tiny), device_map=device_map).load_model()


def test_memory_that_runs_out_while_loading(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(DeviceMemoryError):
        ModelLoader(str(tiny), shown_name="org/name").load_model()


def test_the_unexpected_is_logged_under_its_incident(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("a surprise")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError) as caught:
        ModelLoader(str(tiny)).load_model()
    assert "a surprise" not in str(caught.value)
    assert caught.value.incident in caplog.text
    assert "a surprise" in caplog.text
