import itertools

from hypothesis import given
from hypothesis import strategies as st

from loaderd.server.worker.engine.stops import StopStrings

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def run(pieces: list[str], stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """What a client sees of the pieces, and the stop string that ended it."""
    matcher = StopStrings(stops, include=include)
    seen = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        seen += text
        if stop is not None:
            return seen, stop
    return seen + matcher.flush(), None


def reference(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """The definition: the first place where a stop string ends; the longest one there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(text=TEXTS, stops=STOPS, include=st.booleans(), data=st.data())
def test_the_way_the_text_is_cut_makes_no_difference(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert run(pieces, stops, include=include) == reference(text, stops, include=include)


def test_a_stop_string_is_found_across_pieces_and_cut() -> None:
    assert run(["one E", "N", "D two"], ["END"]) == ("one ", "END")


def test_it_is_kept_on_request_but_nothing_after_it() -> None:
    assert run(["one E", "N", "D two"], ["END"], include=True) == ("one END", "END")


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["END"], include=False)
    assert matcher.push("one E") == ("one ", None)
    assert matcher.push("x") == ("Ex", None)
    assert matcher.push("EN") == ("", None)
    assert matcher.flush() == "EN"


def test_the_longest_of_two_that_end_at_one_place_wins() -> None:
    assert run(["xa", "b"], ["b", "ab"]) == ("x", "ab")
