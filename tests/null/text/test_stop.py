"""Stop strings: the same answer for every split of the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.text import StopChecker, StopMatch

letters = st.text(alphabet="ab", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def expected_match(text: str, stops: list[str]) -> StopMatch | None:
    """Brute force: first end, then the longest stop."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return StopMatch(stop, end - len(stop), end)
    return None


@given(pieces=st.lists(letters, max_size=6), stops=stop_lists, include=st.booleans())
def test_output_and_match_do_not_depend_on_the_split(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    text = "".join(pieces)
    checker = StopChecker(stops, include)
    shown, matched = "", None
    for piece in pieces:
        safe, stop = checker.push(piece)
        shown += safe
        matched = matched or stop
    shown += checker.flush()
    match = expected_match(text, stops)
    assert checker.match == match
    assert matched == (match.stop if match else None)
    if match is None:
        assert shown == text
    else:
        assert shown == text[: match.end if include else match.start]


def test_only_what_could_become_a_stop_is_held_back() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert checker.push("hello\n") == ("hello", None)
    assert checker.push("world") == ("\nworld", None)
    assert checker.push("\n\nUse") == ("", None)
    assert checker.push("r: hi") == ("", "\n\nUser:")
    assert checker.push("more") == ("", None)
    assert checker.flush() == ""


def test_without_stops_text_passes() -> None:
    checker = StopChecker([])
    assert checker.push("abc") == ("abc", None)
    assert checker.flush() == ""


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopChecker(["a", ""])
