"""A stream that was cut anywhere and resumed elsewhere is the stream that was never cut.

Real scheduler, memory and sampler on the null device, whose tokens depend on everything before them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest

from tests.null.service.conftest import ASSETS, byte_ids
from xllm.config import SchedulerConfig
from xllm.service.choice_text import choice_text
from xllm.service.journal import RequestJournal
from xllm.service.stream import Delta, Usage
from xllm.testing.null_engine import NullEngine, null_engine, spec
from xllm.text.assets import TextAssets
from xllm.types import RequestSpec
from xllm.wire.messages import Frame

TEXT = TextAssets.from_card_assets(ASSETS)
PROMPT = byte_ids("Tell me of the sea, and of the ships that went there in the old days. " * 2)


@dataclass
class Told:
    """What a client has seen of one request."""

    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)
    logprobs: dict[int, tuple[object, ...]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    ends: dict[int, tuple[str | None, object]] = field(default_factory=dict)
    prompt_logprobs: list[object] = field(default_factory=list)
    usage: Usage | None = None

    def add(self, delta: Delta) -> None:
        c = delta.choice
        assert c not in self.ends, "output after the end of a choice"
        self.tokens[c] = self.tokens.get(c, ()) + delta.token_ids
        self.logprobs[c] = self.logprobs.get(c, ()) + tuple(delta.logprobs)
        self.text[c] = self.text.get(c, "") + delta.text
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs.append(delta.prompt_logprobs)
        if delta.finish_reason is not None:
            self.ends[c] = (delta.finish_reason, delta.stop_reason)


def engine(seed: int) -> NullEngine:
    """Budgets vary, so that chunks do; other requests keep it company."""
    rng = random.Random(seed)
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=rng.choice([7, 33, 64, 500]))
    made = null_engine(num_pages=24, config=config)
    for i in range(rng.randrange(3)):
        prompt = tuple(rng.randrange(3, 259) for _ in range(rng.randint(1, 150)))
        made.core.submit(spec(f"other {i}", prompt, max_tokens=20, ignore_eos=True))
    return made


def run(request: RequestSpec, cuts: list[int], seed: int = 0) -> tuple[Told, RequestJournal]:
    """Serve it; after each of `cuts` frames (counted anew each time) the engine dies and another goes on."""
    journal = RequestJournal(request, head_width=512, make_text=lambda: choice_text(TEXT, request.params))
    told, attempt_spec, late = Told(), request, []
    for life, cut in enumerate([*cuts, 10**9]):
        instance = engine(seed * 100 + life)
        instance.core.submit(attempt_spec)
        mine: list[Frame] = []
        while not journal.ended and len(mine) < cut:
            assert instance.core.has_requests
            for frame in instance.step():
                if frame.request_id != request.request_id:
                    continue
                mine.append(frame)
                # What the dead one had said but nobody read comes after all, too late.
                if len(mine) > cut:
                    late.append(frame)
                    continue
                for heard in (*late, frame):
                    delta = journal.absorb(heard)
                    assert delta is None or heard is frame
                    if delta is not None:
                        told.add(delta)
                late = []
        if journal.ended:
            break
        attempt_spec = journal.begin_attempt(None)
    told.usage = journal.usage()
    assert journal.num_divergences == 0
    return told, journal


LETTERS = byte_ids("abc")
KINDS: dict[str, dict[str, object]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.95, "top_k": 50, "min_p": 0.01},
    "two": {"temperature": 1.0, "seed": 3, "n": 2},
    "three with a stop": {
        "temperature": 1.0,
        "seed": 11,
        "n": 3,
        "stop": "abc",
        "allowed_token_ids": LETTERS,
    },
    "stop string": {"temperature": 1.0, "seed": 6, "stop": ("abcab", "cccc"), "allowed_token_ids": LETTERS},
    "stop shown": {
        "temperature": 1.0,
        "seed": 5,
        "stop": "bcb",
        "min_tokens": 9,
        "include_stop_str_in_output": True,
        "allowed_token_ids": LETTERS,
    },
    "stop ids": {"temperature": 1.0, "seed": 9, "stop_token_ids": tuple(range(3, 30))},
    "eos": {"temperature": 1.0, "seed": 2, "logit_bias": {2: 4.5}, "ignore_eos": False},
    "penalties": {
        "temperature": 0.8,
        "seed": 4,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.3,
    },
    "min tokens": {"logit_bias": {2: 50.0}, "min_tokens": 17, "ignore_eos": False},
    "logprobs": {"logprobs": 3, "temperature": 1.0, "seed": 8, "n": 2},
    "prompt logprobs": {"prompt_logprobs": 2, "logprobs": 0, "temperature": 1.0, "seed": 8, "n": 2},
    "bad words": {
        "bad_words_token_ids": ((40,), (50, 51), (60, 61, 62)),
        "allowed_token_ids": (40, 50, 51, 60, 61, 62),
    },
    "one token": {"max_tokens": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_equals_the_uninterrupted_one(kind: str) -> None:
    fields = {"max_tokens": 40, "ignore_eos": True, **KINDS[kind]}
    request = spec("r", PROMPT, **fields)
    whole, _ = run(request, [])
    num_frames = max(sum(len(t) for t in whole.tokens.values()), 1)
    rng = random.Random(kind)
    for trial in range(8):
        cuts = sorted({rng.randrange(num_frames + 1) for _ in range(rng.randint(1, 3))}, reverse=True)
        cut, journal = run(request, cuts, seed=trial + 1)
        assert msgspec.to_builtins(cut.usage) == {
            **msgspec.to_builtins(whole.usage),
            "cached_tokens": cut.usage.cached_tokens if cut.usage else 0,
        }
        cut.usage = whole.usage
        assert cut == whole, (kind, trial, cuts)
    if "prompt_logprobs" in fields:
        assert len(whole.prompt_logprobs) == 1
        assert len(whole.prompt_logprobs[0]) == len(PROMPT) - 1  # type: ignore[arg-type]


def test_the_ends_that_the_kinds_are_about_do_occur() -> None:
    """Else the comparisons above would prove little."""
    ends = {}
    for kind, fields in KINDS.items():
        whole, _ = run(spec("r", PROMPT, **{"max_tokens": 40, "ignore_eos": True, **fields}), [])
        ends[kind] = whole.ends
    assert isinstance(ends["stop string"][0][1], str)
    assert ends["stop shown"] == {0: ("stop", "bcb")}
    assert ends["stop ids"][0][0] == "stop"
    assert ends["eos"] == {0: ("stop", None)}
    assert ends["min tokens"] == {0: ("stop", None)}
    assert ("stop", "abc") in ends["three with a stop"].values()
    assert ends["greedy"] == {0: ("length", None)}


def test_an_attempt_after_the_prompts_logprobs_were_delivered_does_not_compute_them_again() -> None:
    request = spec("r", PROMPT, prompt_logprobs=1, max_tokens=10, ignore_eos=True)
    _, journal = run(request, [3])
    resumed = journal.begin_attempt(5.0)
    assert journal.attempt == 2
    assert resumed.params.prompt_logprobs is None
    assert resumed.deadline_ms == 5.0
    fresh = RequestJournal(request, head_width=512, make_text=lambda: choice_text(TEXT, request.params))
    assert fresh.begin_attempt(None).params.prompt_logprobs == 1
