"""A fixed set of requests, and what a client sees of each: tokens, texts, ends, usage, and when.

Knows HTTP only. Two answers to one request are compared as values; times are kept apart from them.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

WORDS = "the a of river stone king light under seven green and was then who sang over old road".split()


class BrokenStreamError(Exception):
    """The client got an error, or a stream that ended without its end."""


@dataclass(slots=True)
class ChoiceSeen:
    """Everything of one choice that must not depend on faults."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None


@dataclass(slots=True)
class Answer:
    """`choices` and `usage` are the answer; `times_s` is when each piece of output arrived."""

    choices: list[ChoiceSeen]
    usage: dict[str, Any] | None = None
    times_s: list[float] = field(default_factory=list)
    began_s: float = 0.0

    def content(self) -> tuple[Any, ...]:
        """What must be equal. Cached tokens are left out: where a prefix lies is not part of the answer."""
        usage = self.usage or {}
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        return (
            *((c.token_ids, c.text, c.logprobs, c.finish_reason, c.stop_reason) for c in self.choices),
            counts,
        )

    @property
    def longest_gap_s(self) -> float:
        """Between two pieces of output; the wait for the first one is no gap of the stream."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max((b - a for a, b in pairs), default=0.0)


def bodies(model: str, count: int, seed: int, *, max_tokens: int = 128) -> list[dict[str, Any]]:
    """Greedy, seeded, stop strings, logprobs, n = 2 and penalties in turn, over shared and own prompts."""
    rng = random.Random(seed)
    shared = "You are a careful and friendly assistant who answers in one sentence. " * 8
    made = []
    for index in range(count):
        prompt = (shared if index % 3 == 0 else "") + " ".join(rng.choices(WORDS, k=rng.choice([4, 30, 150])))
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": rng.randint(max_tokens // 2, max_tokens),
            "temperature": 0.0,
            "stream": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        kind = index % 6
        if kind in (1, 3, 5):
            body |= {"temperature": 0.8, "seed": rng.randint(0, 2**31)}
        if kind == 2:
            body |= {"stop": [rng.choice(WORDS) + " " + rng.choice(WORDS), "\n\n"]}
        if kind == 3:
            body |= {"logprobs": 2}
        if kind == 4:
            body |= {"presence_penalty": 0.7, "frequency_penalty": 0.3, "min_tokens": 20}
        if kind == 5:
            body |= {"n": 2}
        made.append(body)
    return made


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """One stream to its end. Raises BrokenStreamError for everything but a complete answer."""
    answer = Answer([ChoiceSeen() for _ in range(body.get("n", 1))], began_s=time.monotonic())
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise BrokenStreamError(f"HTTP {response.status_code}: {(await response.aread())[:300]!r}")
            await _read(response, answer)
    except httpx.HTTPError as error:
        raise BrokenStreamError(f"{type(error).__name__} after {len(answer.times_s)} pieces") from error
    return answer


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """As its `aiter_lines`, which also takes U+0085 or U+2028 inside an event for the end of a line."""
    rest = ""
    async for text in response.aiter_text():
        *whole, rest = (rest + text).split("\n")
        for line in whole:
            yield line


async def _read(response: httpx.Response, answer: Answer) -> None:
    async for line in _lines(response):
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            _check_ended(answer)
            return
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise BrokenStreamError(f"error after {len(answer.times_s)} pieces: {line[6:300]}")
        answer.usage = chunk.get("usage") or answer.usage
        for piece in chunk["choices"]:
            answer.times_s.append(time.monotonic())
            _add(answer.choices[piece["index"]], piece)
    raise BrokenStreamError("a stream ended without [DONE]")


def _add(choice: ChoiceSeen, piece: dict[str, Any]) -> None:
    if choice.finish_reason is not None:
        raise BrokenStreamError("output after the end of a choice")
    choice.token_ids.extend(piece.get("token_ids") or [])
    choice.text += piece["text"]
    if piece.get("logprobs"):
        choice.logprobs.append(piece["logprobs"]["token_logprobs"])
    choice.finish_reason = piece["finish_reason"]
    choice.stop_reason = piece.get("stop_reason")


def _check_ended(answer: Answer) -> None:
    if any(choice.finish_reason is None for choice in answer.choices):
        raise BrokenStreamError("[DONE] before every choice had its end")
    # How a choice's logprobs fall into pieces is no part of the answer.
    for choice in answer.choices:
        choice.logprobs = [value for piece in choice.logprobs for value in piece]
