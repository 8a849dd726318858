from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.unit.worker.engine_client import EOS, SIZES, Client, build, reference


@pytest.fixture(scope="module", params=SIZES)
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    client = Client(build(request.param))
    yield client
    client.engine.close()


@pytest.fixture(scope="module")
def shared_llama() -> Iterator[Client]:
    client = Client(build("llama"))
    yield client
    client.engine.close()


@pytest.fixture
def llama(shared_llama: Client) -> Iterator[Client]:
    own = shared_llama.model.generation_config.to_dict()
    yield shared_llama
    assert shared_llama.model.generation_config.to_dict() == own, "a request changed the model"


def test_greedy_output_is_that_of_transformers(client: Client) -> None:
    expected = reference(client.model, do_sample=False, max_new_tokens=40)
    outputs = client.generate(do_sample=False, max_new_tokens=40, return_token_ids=True)
    assert outputs.token_ids == expected
    assert len(set(expected)) > 3, "a model that says one thing only proves nothing"


def test_seeded_samples_are_those_of_transformers(client: Client) -> None:
    torch.manual_seed(7)
    options: dict[str, Any] = {
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.98,
    }
    expected = reference(client.model, do_sample=True, max_new_tokens=30, **options)
    assert client.token_ids(seed=7, max_new_tokens=30, **options) == expected


def test_penalties_are_those_of_transformers(llama: Client) -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    expected = reference(llama.model, do_sample=False, max_new_tokens=30, **options)
    assert llama.token_ids(do_sample=False, max_new_tokens=30, **options) == expected
    assert expected != reference(llama.model, do_sample=False, max_new_tokens=30)


def test_unset_options_are_the_models_own_as_in_transformers() -> None:
    model = build("llama")
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=9,
        repetition_penalty=1.2,
        eos_token_id=EOS,
    )
    client = Client(model)
    torch.manual_seed(3)
    expected = reference(model, max_new_tokens=30, pad_token_id=EOS)
    assert client.token_ids(seed=3, max_new_tokens=30) == expected
    client.engine.close()


def test_without_own_options_nothing_is_cut_off(llama: Client) -> None:
    """transformers' own default would be the 50 most probable of these 97 tokens."""
    torch.manual_seed(5)
    expected = reference(llama.model, do_sample=True, top_k=0, temperature=5.0, max_new_tokens=40)
    assert llama.token_ids(seed=5, temperature=5.0, max_new_tokens=40) == expected
    torch.manual_seed(5)
    assert reference(llama.model, do_sample=True, temperature=5.0, max_new_tokens=40) != expected


def test_the_options_of_one_request_do_not_reach_the_next(llama: Client) -> None:
    plain = llama.token_ids(do_sample=False, max_new_tokens=20)
    llama.generate(
        temperature=9.0, top_k=2, repetition_penalty=9.0, no_repeat_ngram_size=1,
        min_new_tokens=5, max_new_tokens=9, stop_token_ids=list(range(50)), ignore_eos=True,
    )  # fmt: skip
    assert llama.token_ids(do_sample=False, max_new_tokens=20) == plain


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seed_gives_the_same_tokens_again_and_is_echoed(llama: Client, seed: int) -> None:
    first = llama.generate(temperature=2.0, seed=seed, max_new_tokens=20, return_token_ids=True)
    second = llama.generate(temperature=2.0, seed=seed, max_new_tokens=20, return_token_ids=True)
    assert first.token_ids == second.token_ids
    assert first.started is not None
    assert first.finished is not None
    assert first.started.seed == first.finished.seed == seed


def test_a_drawn_seed_can_be_given_back(llama: Client) -> None:
    first = llama.generate(temperature=3.0, max_new_tokens=20, return_token_ids=True)
    assert first.started is not None
    again = llama.token_ids(temperature=3.0, max_new_tokens=20, seed=first.started.seed)
    assert again == first.token_ids
    assert llama.token_ids(temperature=3.0, max_new_tokens=20) != again


def test_generate_says_nothing(llama: Client, recwarn: pytest.WarningsRecorder) -> None:
    llama.generate(max_new_tokens=3, temperature=0.5, top_k=3)
    llama.generate(max_new_tokens=3, do_sample=False, ignore_eos=True)
    assert [str(warning.message) for warning in recwarn] == []
