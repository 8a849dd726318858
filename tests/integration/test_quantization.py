"""Quantized weights and GGUF files: a spawned daemon, the real model, the SDK."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loaderd.client import Client, Quantization, errors
from tests.hub.tiny_gguf import write_tiny_gguf

PROMPT = "The sky is blue because"
TOKENS = 16
# What transformers does by itself, in a process of its own: the tests' one needs no torch.
REFERENCE = """
import sys, torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
)
prompt = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2], return_tensors="pt")
output = model.generate(**prompt, do_sample=False, max_new_tokens=int(sys.argv[3]))
print(*output[0, prompt["input_ids"].shape[1] :].tolist())
"""


@pytest.fixture(scope="module")
def gguf_file(tiny_model: Path) -> Path:
    folder = tiny_model.parent / "gguf"
    folder.mkdir()
    return write_tiny_gguf(tiny_model, folder / "tiny-q8_0.gguf")


def test_int8_weights_take_less_and_give_what_transformers_gives(
    client: Client, real_model: Path
) -> None:
    command = [sys.executable, "-c", REFERENCE, str(real_model), PROMPT, str(TOKENS)]
    reference = subprocess.run(command, check=True, capture_output=True, text=True)
    model = client.load(str(real_model), dtype="float32", quantization="int8")
    details = model.info.details
    assert details is not None
    assert model.info.options.quantization is details.quantization is Quantization.INT8
    assert "210 of 211 linear layers as int8, by torchao" in details.quantization_reason
    assert details.engine == "batching"
    assert details.parameter_count == 134_515_008
    assert details.weight_bytes < 0.45 * 4 * details.parameter_count
    result = model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False, return_token_ids=True)
    assert list(result.token_ids) == [int(token) for token in reference.stdout.split()]


def test_other_weights_are_another_model(client: Client, tiny_model: Path) -> None:
    plain = client.load(str(tiny_model), dtype="float32")
    fewer = client.load(str(tiny_model), dtype="float32", quantization="int8")
    assert plain.id != fewer.id
    assert (
        client.load(str(tiny_model), dtype="float32", quantization=Quantization.INT8).id == fewer.id
    )
    assert plain.info.options.quantization is None
    for model in (plain, fewer):
        assert model.generate("one", max_new_tokens=2, ignore_eos=True).usage.generated_tokens == 2


def test_a_gguf_file_is_a_model(client: Client, gguf_file: Path) -> None:
    model = client.load(str(gguf_file))
    details = model.info.details
    assert details is not None
    assert (details.architecture, details.quantization) == ("LlamaForCausalLM", None)
    assert "GGUF" in details.quantization_reason
    assert details.has_chat_template
    assert client.model(gguf_file).id == model.id
    messages = [{"role": "user", "content": "Hi"}]
    assert model.generate(messages=messages, max_new_tokens=3, ignore_eos=True).text
    assert client.load(str(gguf_file.parent)).info.state is model.info.state


def test_gguf_files_that_cannot_be_loaded_say_why(client: Client, gguf_file: Path) -> None:
    several = gguf_file.parent.parent / "several"
    shutil.copytree(gguf_file.parent, several)
    cut = several / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:-1000])
    with pytest.raises(errors.ModelUnsupportedError, match=r"cut\.gguf, tiny-q8_0\.gguf"):
        client.load(str(several))
    with pytest.raises(errors.SnapshotCorruptError) as caught:
        client.load(str(cut))
    assert caught.value.file == cut.name
    with pytest.raises(errors.UnsupportedOptionError, match="already") as refused:
        client.load(str(gguf_file), quantization="int8")
    assert refused.value.field == "options.quantization"
