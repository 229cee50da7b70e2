"""Deltas to RequestOutput: vLLM's shapes for logprobs, and outputs that later deltas leave alone."""

from __future__ import annotations

import pytest

from xllm.outputs import Logprob, OutputBuilder
from xllm.service.stream import Delta
from xllm.types import Logprob as WireLogprob
from xllm.types import TokenLogprobs


def entry(token: int, logprob: float, *top: tuple[int, float]) -> TokenLogprobs:
    best = tuple(WireLogprob(t, lp, rank + 1) for rank, (t, lp) in enumerate(top))
    return TokenLogprobs(WireLogprob(token, logprob, 2), best)


def builder(num_choices: int = 1, *, with_logprobs: bool = True) -> OutputBuilder:
    return OutputBuilder(
        request_id="r",
        prompt="p",
        prompt_token_ids=(1, 2),
        num_choices=num_choices,
        with_logprobs=with_logprobs,
        decode=lambda token: f"<{token}>",
    )


def test_logprobs_are_maps_with_the_token_itself_first() -> None:
    made = builder()
    made.add(Delta(choice=0, text="a", token_ids=(5,), logprobs=(entry(5, -2.0, (7, -0.5), (5, -2.0)),)))
    made.add(Delta(choice=0, text="b", token_ids=(6,), logprobs=(entry(6, -1.5),), finish_reason="length"))
    (choice,) = made.output(0).outputs
    assert choice.logprobs is not None
    assert list(choice.logprobs[0]) == [5, 7]
    assert choice.logprobs[0][7] == Logprob(-0.5, 1, "<7>")
    assert choice.cumulative_logprob == pytest.approx(-3.5)


def test_the_first_prompt_token_has_no_logprob() -> None:
    made = builder(with_logprobs=False)
    made.add(Delta(choice=0, prompt_logprobs=(entry(2, -1.0),), finish_reason="length"))
    output = made.output(1)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None
    assert output.num_cached_tokens == 1


def test_an_output_is_finished_when_all_choices_are_and_does_not_change_later() -> None:
    made = builder(2)
    made.add(Delta(choice=1, text="x", token_ids=(9,), finish_reason="stop", stop_reason="\n"))
    early = made.output(0)
    made.add(Delta(choice=0, text="y", token_ids=(8,), finish_reason="length"))
    assert not early.finished
    assert early.outputs[0].token_ids == []
    assert made.output(0).finished
    ends = [(c.index, c.text, c.stop_reason) for c in made.output(0).outputs]
    assert ends == [(0, "y", None), (1, "x", "\n")]
