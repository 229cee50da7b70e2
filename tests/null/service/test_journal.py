"""The commit log as judge of frames: dedupe, divergence, gaps, attempts, one terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.null.service.conftest import ASSETS, byte_ids
from xllm.errors import InternalError
from xllm.service.choice_text import choice_text
from xllm.service.journal import RequestJournal
from xllm.text.assets import TextAssets
from xllm.types import FinishReason, Logprob, RequestSpec, SamplingParams, TokenLogprobs, TokenSegment
from xllm.wire.messages import Frame

TEXT = TextAssets.from_card_assets(ASSETS)


def journal(attempt: int = 0, **params: object) -> RequestJournal:
    sampling = SamplingParams(**{"max_tokens": 100, **params})  # type: ignore[arg-type]
    spec = RequestSpec(
        request_id="r", model="m", segments=(TokenSegment((5, 6, 7)),), params=sampling, attempt=attempt
    )
    return RequestJournal(spec, head_width=512, make_text=lambda: choice_text(TEXT, sampling))


def frame(offset: int, text: str, **fields: object) -> Frame:
    return Frame(request_id="r", offset=offset, tokens=byte_ids(text), **fields)  # type: ignore[arg-type]


def test_an_overlap_is_delivered_once() -> None:
    log = journal()
    assert log.absorb(frame(0, "abc")).text == "abc"
    assert log.absorb(frame(1, "bcd")).text == "d"
    assert log.absorb(frame(0, "abcd")) is None
    assert log.num_divergences == 0
    assert log.usage().completion_tokens == 4


def test_a_divergent_overlap_is_counted_and_what_was_delivered_stays() -> None:
    log = journal()
    log.absorb(frame(0, "abc"))
    delta = log.absorb(frame(1, "XYd"))
    assert delta.text == "d"
    assert tuple(log.choices[0].tokens) == byte_ids("abcd")
    assert log.num_divergences == 1


def test_frames_of_another_attempt_change_nothing() -> None:
    log = journal(attempt=3)
    assert log.absorb(frame(0, "abc", attempt=2)) is None
    assert log.absorb(frame(0, "", attempt=2, finish_reason=FinishReason.ABORT, last=True)) is None
    assert log.absorb(frame(0, "abc", attempt=3)).text == "abc"
    assert log.num_stale_frames == 2
    assert not log.ended


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (frame(1, "a"), "gap"),
        (frame(-1, "a"), "gap"),
        (frame(0, "a", choice=1), "not asked for"),
        (frame(0, "a" * 101), "max_tokens"),
        (Frame(request_id="r", tokens=(512,)), "vocabulary"),
        (Frame(request_id="r", tokens=(-1,)), "vocabulary"),
        (frame(0, "ab", logprobs=(TokenLogprobs(Logprob(1, -1.0, 1)),)), "logprobs"),
        (frame(0, "a", last=True), "before all of its choices"),
        (frame(0, "", finish_reason=FinishReason.ERROR, last=True), "did not name"),
    ],
)
def test_a_frame_that_breaks_the_protocol_is_an_error(bad: Frame, why: str) -> None:
    with pytest.raises(InternalError, match=why):
        journal().absorb(bad)


def test_nothing_follows_a_choice_that_has_ended() -> None:
    log = journal(n=2)
    end = log.absorb(frame(0, "ab", finish_reason=FinishReason.LENGTH))
    assert end.finish_reason == "length"
    assert log.absorb(frame(2, "cd")) is None
    assert log.absorb(frame(0, "", finish_reason=FinishReason.STOP)) is None
    assert log.usage().completion_tokens == 2
    assert not log.ended


def test_the_text_of_a_stop_token_is_hidden_and_its_id_named() -> None:
    log = journal(stop_token_ids=(3 + ord("!"),))
    stop_id = 3 + ord("!")
    delta = log.absorb(frame(0, "ab!", finish_reason=FinishReason.STOP, stop_token_id=stop_id, last=True))
    assert delta.text == "ab"
    assert delta.token_ids == byte_ids("ab!")
    assert (delta.finish_reason, delta.stop_reason) == ("stop", stop_id)


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    log = journal()
    assert log.absorb(Frame(request_id="r", tokens=(3 + 0xC3,))).text == ""
    end = log.absorb(Frame(request_id="r", offset=1, finish_reason=FinishReason.LENGTH, last=True))
    assert end.text == "\ufffd"


def test_prompt_logprobs_come_once_with_the_first_delta_of_choice_0() -> None:
    one, two = (TokenLogprobs(Logprob(i, -1.0, 1)) for i in (6, 7))
    log = journal(n=2, prompt_logprobs=0)
    assert log.absorb(Frame(request_id="r", prompt_logprobs=(one,))) is None
    assert log.absorb(frame(0, "a", choice=1)).prompt_logprobs is None
    assert log.absorb(frame(0, "a", prompt_logprobs=(two,))).prompt_logprobs == (one, two)
    assert log.absorb(frame(1, "b")).prompt_logprobs is None


def test_logprobs_are_cut_with_the_tokens() -> None:
    lps = tuple(TokenLogprobs(Logprob(t, -1.0, 1)) for t in byte_ids("aENDb"))
    delta = journal(stop="END", logprobs=0).absorb(frame(0, "aENDb", logprobs=lps))
    assert delta.logprobs == lps[:4]


@given(
    text=st.text(alphabet="aéS TOP日", max_size=30),
    stops=st.lists(st.sampled_from(["STOP", "TO", "é日", "  "]), max_size=2),
    min_tokens=st.integers(0, 10),
    cuts=st.lists(st.integers(0, 100), max_size=8),
)
def test_output_does_not_depend_on_how_it_was_framed(
    text: str, stops: list[str], min_tokens: int, cuts: list[int]
) -> None:
    tokens = byte_ids(text)
    whole = _feed(tokens, [], stops, min_tokens)
    assert _feed(tokens, cuts, stops, min_tokens) == whole
    shown, log, reason, stop = whole
    if stop is None:
        assert (shown, log, reason) == (text, tokens, "length")
    else:
        assert stop in stops
        assert text.startswith(shown + str(stop))
        assert len(log) > min_tokens
        assert reason == "stop"


def _feed(
    tokens: tuple[int, ...], cuts: list[int], stops: list[str], min_tokens: int
) -> tuple[str, tuple[int, ...], str | None, object]:
    """Text, log, finish and stop reason after frames cut at `cuts`, the last one ending the choice."""
    log = journal(stop=tuple(stops), min_tokens=min_tokens, max_tokens=max(1, len(tokens)))
    points = sorted({min(c, len(tokens)) for c in cuts} | {0})
    shown = ""
    for start, end in zip(points, [*points[1:], len(tokens)], strict=True):
        last = end == len(tokens)
        reason = FinishReason.LENGTH if last else None
        piece = Frame(request_id="r", offset=start, tokens=tokens[start:end], finish_reason=reason, last=last)
        if log.ended:
            break
        if (delta := log.absorb(piece)) is not None:
            shown += delta.text
    choice = log.choices[0]
    return shown, tuple(choice.tokens), choice.finish_reason, choice.stop_reason
