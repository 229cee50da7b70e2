"""Incremental detokenising equals decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.null.text.tokenizers_for_tests import byte_level, sentencepiece
from xllm.text import IncrementalDetokenizer, TextAssets

FAMILIES = {"byte level": byte_level, "sentencepiece": sentencepiece}
ids_in_pieces = st.lists(st.lists(st.integers(0, 600), max_size=6), max_size=12)


@pytest.mark.parametrize("family", FAMILIES)
@given(pieces=ids_in_pieces, skip=st.booleans(), continuation=st.booleans())
def test_any_split_of_any_ids_gives_the_decoded_text(
    family: str, pieces: list[list[int]], skip: bool, continuation: bool
) -> None:
    tokenizer = FAMILIES[family]().tokenizer
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, continuation=continuation)
    text = "".join(detokenizer.push(piece) for piece in pieces) + detokenizer.finish()
    everything = [i for piece in pieces for i in piece]
    assert text == tokenizer.decode(everything, skip, continuation=continuation)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=st.text(max_size=60))
def test_text_survives_encoding_and_one_token_at_a_time(family: str, text: str) -> None:
    assets: TextAssets = FAMILIES[family]()
    ids = assets.tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    detokenizer = IncrementalDetokenizer(assets.tokenizer, continuation=False)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == text


@pytest.mark.parametrize("family", FAMILIES)
@given(ids=st.lists(st.integers(0, 600), max_size=40), skip=st.booleans(), continuation=st.booleans())
def test_one_token_at_a_time_is_the_same_as_any_other_way(
    family: str, ids: list[int], skip: bool, continuation: bool
) -> None:
    tokenizer = FAMILIES[family]().tokenizer
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, continuation=continuation)
    other = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, continuation=continuation)
    for token in ids:
        assert detokenizer.push_one(token) == other.push((token,))
    assert detokenizer.finish() == other.finish()


def test_an_unfinished_character_is_held_back_and_becomes_a_replacement_character_at_the_end() -> None:
    tokenizer = byte_level().tokenizer
    first, *rest = tokenizer.encode("é", parse_special=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert rest
    assert detokenizer.push([first]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert tokenizer.decode([first]) == "\ufffd"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = byte_level().tokenizer
    ids = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.decode(ids) == "ab"
    assert IncrementalDetokenizer(tokenizer, skip_special_tokens=False).push(ids) == "a<|im_end|>b"


def test_generated_text_keeps_the_space_that_a_whole_text_drops() -> None:
    tokenizer = sentencepiece().tokenizer
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    assert tokenizer.decode(ids) == "the cat"
    assert IncrementalDetokenizer(tokenizer).push(ids) == " the cat"


@given(st.lists(st.integers(0, 300), max_size=40))
def test_bytes_of_tokens_join_to_the_bytes_of_the_text(ids: list[int]) -> None:
    tokenizer = sentencepiece().tokenizer
    joined = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert joined.decode("utf-8", "replace") == tokenizer.decode(ids, False, continuation=True)
