import itertools
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loaderd.server.worker.detokenizer import Detokenizer
from loaderd.server.worker.tokenization import special_ids

CORPUS = ["The sky is blue.", "Wie heißt du?", "日本語のテキスト", "Привет, мир", "a b  c   d"]
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
KINDS = ("real", "metaspace", "byte-fallback")


def metaspace_tokenizer() -> Tokenizer:
    """Sentencepiece's way: a space is part of the word after it, and none begins a text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Llama 2's way: what the vocabulary lacks comes as a token a byte."""
    letters = sorted(set("▁".join(CORPUS[:2]).replace(" ", "▁")))
    words = ["▁s", "▁sk", "▁sky", "▁b", "he", "▁▁"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += letters + words
    merges = [("▁", "s"), ("▁s", "k"), ("▁sk", "y"), ("▁", "b"), ("h", "e"), ("▁", "▁")]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers(real_model: Path) -> dict[str, Any]:
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    built = {"metaspace": metaspace_tokenizer(), "byte-fallback": byte_fallback_tokenizer()}
    wrapped = {
        name: PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        for name, tokenizer in built.items()
    }
    return {"real": AutoTokenizer.from_pretrained(real_model), **wrapped}


@pytest.fixture(scope="session")
def vocabulary(tokenizers: dict[str, Any]) -> dict[str, int]:
    """Of the real model."""
    return dict(tokenizers["real"].get_vocab())


def deltas(
    tokenizer: Any, token_ids: Iterable[int], *, skip: bool = True, prompt: Sequence[int] = ()
) -> list[str]:
    special = special_ids(tokenizer) if skip else frozenset[int]()
    detokenizer = Detokenizer(tokenizer, special, prompt)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def decode(tokenizer: Any, token_ids: Sequence[int], *, skip: bool = True) -> str:
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    return text


def encode_in_pieces(tokenizer: Any, text: str, cuts: list[int]) -> list[int]:
    """Other tokens of the same text than its own encoding has."""
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = (text[a:b] for a, b in itertools.pairwise(bounds))
    return [
        token_id
        for piece in pieces
        for token_id in tokenizer.encode(piece, add_special_tokens=False)
    ]


relaxed = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=100,
)


@pytest.mark.parametrize("kind", KINDS)
@relaxed
@given(text=TEXT, cuts=st.lists(st.integers(0, 40), max_size=8))
def test_the_deltas_joined_are_the_text(
    tokenizers: dict[str, Any], kind: str, text: str, cuts: list[int]
) -> None:
    tokenizer = tokenizers[kind]
    token_ids = encode_in_pieces(tokenizer, text, cuts)
    pieces = deltas(tokenizer, token_ids)
    assert "".join(pieces) == decode(tokenizer, token_ids)


@relaxed
@given(text=TEXT, seed=st.integers(0, 2**32))
def test_characters_split_over_many_tokens_come_whole(
    tokenizers: dict[str, Any], vocabulary: dict[str, int], text: str, seed: int
) -> None:
    """Byte-level tokens that begin and end anywhere inside characters."""
    tokenizer = tokenizers["real"]
    letters = byte_letters()
    draw = random.Random(seed)
    rest, token_ids = [letters[byte] for byte in text.encode()], []
    assume(vocabulary.keys() >= set(rest))  # it lacks a few bytes that no text has
    while rest:
        token = "".join(rest[: draw.randint(1, 5)])
        token = token if token in vocabulary else rest[0]
        token_ids.append(vocabulary[token])
        rest = rest[len(token) :]
    pieces = deltas(tokenizer, token_ids)
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_long_run_of_tokens_that_all_end_inside_characters_is_shown_whole() -> None:
    letters, text = byte_letters(), "日本語" * 20
    written = "".join(letters[byte] for byte in text.encode())
    tokens = [written[0], *(written[at : at + 3] for at in range(1, len(written), 3))]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    pieces = deltas(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer),
        [vocabulary[token] for token in tokens],
    )
    assert "".join(pieces) == text
    assert sum(1 for piece in pieces if piece) > 3, "it must not wait for the end"


def byte_letters() -> list[str]:
    """How byte-level vocabularies write the 256 bytes: GPT-2's printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


@pytest.mark.parametrize("kind", KINDS)
@relaxed
@given(seed=st.integers(0, 2**32), skip=st.booleans(), length=st.integers(0, 60))
def test_any_tokens_of_whole_text_decode_alike(
    tokenizers: dict[str, Any], kind: str, seed: int, skip: bool, length: int
) -> None:
    """Random tokens, special ones among them, as an untrained model would choose them."""
    tokenizer = tokenizers[kind]
    draw = random.Random(seed)
    special = sorted(special_ids(tokenizer))
    token_ids = [
        draw.choice(special) if draw.random() < 0.2 else draw.randrange(len(tokenizer))
        for _ in range(length)
    ]
    token_ids = [token_id for token_id in token_ids if whole(tokenizer, token_id)]
    pieces = deltas(tokenizer, token_ids, skip=skip)
    assert "".join(pieces) == decode(tokenizer, token_ids, skip=skip)


def whole(tokenizer: Any, token_id: int) -> bool:
    return "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode([token_id])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["The sky is blue", "a " + 5 * "\N{GRINNING FACE}" + "é b"])
def test_the_output_goes_on_where_the_prompt_ends(
    tokenizers: dict[str, Any], kind: str, text: str
) -> None:
    """The last tokens of a prompt that leave a character unfinished are the output's."""
    tokenizer = tokenizers[kind]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    whole, finished = decode(tokenizer, token_ids), ""
    for cut in range(1, len(token_ids)):
        prompt = decode(tokenizer, token_ids[:cut])
        finished = finished if "\N{REPLACEMENT CHARACTER}" in prompt else prompt
        shown = "".join(deltas(tokenizer, token_ids[cut:], prompt=token_ids[:cut]))
        assert finished + shown == whole


def test_skipped_special_tokens_do_not_cost_the_space_after_them(
    tokenizers: dict[str, Any],
) -> None:
    tokenizer = tokenizers["metaspace"]
    words = tokenizer.encode("The sky", add_special_tokens=False)
    (end,) = tokenizer.encode("</s>", add_special_tokens=False)[-1:]
    token_ids = [*words, *[end] * 20, *words]
    assert (
        "".join(deltas(tokenizer, token_ids)) == decode(tokenizer, token_ids) == "The sky The sky"
    )
    assert "".join(deltas(tokenizer, words, prompt=[*words, *[end] * 20])) == " The sky"
    assert "".join(deltas(tokenizer, words, prompt=[end])) == "The sky"


class Counting:
    """A tokenizer that counts how many tokens it was given to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.most = 0

    def decode(self, token_ids: list[int], **options: Any) -> str:
        self.most = max(self.most, len(token_ids))
        text: str = self.tokenizer.decode(token_ids, **options)
        return text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("junk", ["text", "special", "bytes", "unknown"])
def test_the_work_per_token_does_not_grow(tokenizers: dict[str, Any], kind: str, junk: str) -> None:
    """Also on runs that never make a whole character, or no text at all."""
    tokenizer = tokenizers[kind]
    vocabulary = tokenizer.get_vocab()
    token_id = {
        "text": tokenizer.encode("sky", add_special_tokens=False)[-1],
        "special": sorted(special_ids(tokenizer))[0],
        "bytes": vocabulary.get("<0xE4>", vocabulary.get("ä", 5)),
        "unknown": len(tokenizer) + 3,
    }[junk]
    counting = Counting(tokenizer)
    detokenizer = Detokenizer(counting, special_ids(tokenizer))
    for _ in range(300):
        detokenizer.push(token_id)
    assert counting.most <= 32


def test_undecodable_bytes_are_shown_in_the_end(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["real"]
    bad = tokenizer.convert_tokens_to_ids(byte_letters()[0xE4])
    token_ids = [bad] * 40 + tokenizer.encode(" sky", add_special_tokens=False)
    assert "".join(deltas(tokenizer, token_ids)) == decode(tokenizer, token_ids)
    assert "".join(deltas(tokenizer, [bad])) == "\N{REPLACEMENT CHARACTER}"
