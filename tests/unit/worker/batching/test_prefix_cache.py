from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from loaderd.server.worker.engine.batching.prefix_cache import PrefixCache

SIZE = 2


def test_a_beginning_is_found_in_whole_blocks() -> None:
    cache = PrefixCache(8, SIZE)
    known, blocks = cache.insert([1, 2, 3, 4, 5], "")
    assert (known, len(blocks)) == (0, 2)
    assert cache.match([1, 2, 3, 4, 9, 9], "") == blocks
    assert cache.match([1, 2, 9, 9], "") == blocks[:1]
    assert cache.match([1, 9], "") == []
    assert cache.match([3, 4], "") == [], "a block counts only after those before it"


def test_what_is_known_is_not_kept_twice() -> None:
    cache = PrefixCache(8, SIZE)
    _, first = cache.insert([1, 2, 3, 4], "")
    known, more = cache.insert([1, 2, 3, 4, 5, 6], "")
    assert known == 4
    assert len(more) == 1
    assert cache.match([1, 2, 3, 4, 5, 6], "") == first + more
    assert cache.insert([1, 2, 3, 4, 5, 6], "") == (6, [])


def test_another_salt_shares_nothing() -> None:
    cache = PrefixCache(8, SIZE)
    cache.insert([1, 2, 3, 4], "mine")
    assert cache.match([1, 2, 3, 4], "yours") == []
    assert cache.match([1, 2, 3, 4], "") == []


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache = PrefixCache(3, SIZE)
    cache.insert([1, 1], "")
    cache.insert([2, 2], "")
    cache.insert([3, 3], "")
    cache.match([1, 1], "")
    cache.insert([4, 4], "")
    assert cache.match([1, 1], "")
    assert not cache.match([2, 2], "")


def test_a_prompt_longer_than_the_cache_is_kept_in_part() -> None:
    cache = PrefixCache(2, SIZE)
    known, blocks = cache.insert([1, 2, 3, 4, 5, 6], "")
    assert (known, len(blocks)) == (0, 2)
    assert cache.match([1, 2, 3, 4, 5, 6], "") == blocks


def test_a_cache_of_no_blocks_keeps_nothing() -> None:
    cache = PrefixCache(0, SIZE)
    assert cache.insert([1, 2], "") == (0, [])
    assert cache.match([1, 2], "") == []


_PROMPTS = st.tuples(
    st.lists(st.integers(0, 1), max_size=12), st.sampled_from(["", "s"]), st.booleans()
)


@settings(max_examples=300)
@given(st.integers(0, 6), st.lists(_PROMPTS, max_size=40))
def test_a_block_that_is_found_holds_what_was_written_for_this_prompt(
    blocks: int, prompts: list[tuple[list[int], str, bool]]
) -> None:
    cache = PrefixCache(blocks, SIZE)
    written: dict[int, tuple[str, tuple[int, ...]]] = {}
    for tokens, salt, insert in prompts:
        if insert:
            known, new = cache.insert(tokens, salt)
            for index, block in enumerate(new):
                written[block] = salt, tuple(tokens[: known + (index + 1) * SIZE])
            assert known + len(new) * SIZE <= len(tokens)
        found = cache.match(tokens, salt)
        assert len(set(found)) == len(found) <= blocks
        for index, block in enumerate(found):
            assert written[block] == (salt, tuple(tokens[: (index + 1) * SIZE]))
