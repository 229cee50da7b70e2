"""Log probabilities in each client's shape, from scripted engine output."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.null.api.conftest import MakeSite, Site, events
from tests.null.api.test_streams import submitted
from xllm.types import FinishReason, Logprob, TokenLogprobs
from xllm.wire.messages import Frame

E_ACUTE = tuple(3 + b for b in "é".encode())  # two tokens, neither of them text of its own


def entry(token: int, logprob: float, *top: tuple[int, float]) -> TokenLogprobs:
    ranked = tuple(Logprob(t, p, i + 1) for i, (t, p) in enumerate(top))
    return TokenLogprobs(Logprob(token, logprob, 2), ranked)


A, B = 3 + ord("a"), 3 + ord("b")
OUT = (B, *E_ACUTE)
OUT_LOGPROBS = (
    entry(B, -0.5, (A, -0.1)),
    entry(E_ACUTE[0], -1.0, (E_ACUTE[0], -1.0)),
    entry(E_ACUTE[1], float("-inf"), (A, 0.0)),
)
PROMPT_LOGPROBS = (entry(B, -2.0, (A, -0.2)),)


@pytest.fixture
async def site(make_site: MakeSite) -> Site:
    made: Site = await make_site(engine={"auto": False})
    return made


async def answered(site: Site, path: str, **body: Any) -> Any:
    """The response to a request whose engine says OUT, one token per frame."""
    asked = asyncio.create_task(site.client.post(path, json=body))
    spec = await submitted(site.engine)
    for i, token in enumerate(OUT):
        last = i == len(OUT) - 1
        site.engine.say(
            Frame(
                request_id=spec.request_id,
                offset=i,
                tokens=(token,),
                logprobs=(OUT_LOGPROBS[i],) if spec.params.logprobs is not None else (),
                prompt_logprobs=PROMPT_LOGPROBS if i == 0 and spec.params.prompt_logprobs is not None else (),
                finish_reason=FinishReason.LENGTH if last else None,
                last=last,
            )
        )
    site.engine._requests.clear()
    response = await asked
    assert response.status_code == 200, response.text
    return events(response.text)[:-1] if body.get("stream") else response.json()


async def test_completions(site: Site) -> None:
    body = await answered(site, "/v1/completions", prompt=[A, B], max_tokens=3, logprobs=1)
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["b", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.5, -1.0, -9999.0],
        "top_logprobs": [{"b": -0.5, "a": -0.1}, {"bytes:\\xc3": -1.0}, {"bytes:\\xa9": -9999.0, "a": 0.0}],
        "text_offset": [0, 1, 1],
    }


async def test_echo_puts_the_prompt_before_the_output(site: Site) -> None:
    body = await answered(
        site, "/v1/completions", prompt=[A, B], max_tokens=3, logprobs=1, echo=True, temperature=0
    )
    choice = body["choices"][0]
    assert choice["text"] == "abbé"
    got = choice["logprobs"]
    assert got["tokens"][:3] == ["a", "b", "b"]
    assert got["token_logprobs"][:3] == [None, -2.0, -0.5]
    assert got["top_logprobs"][:2] == [None, {"b": -2.0, "a": -0.2}]
    assert got["text_offset"] == [0, 1, 2, 3, 3]
    assert body["usage"]["completion_tokens"] == 3


async def test_a_stream_carries_the_same_entries(site: Site) -> None:
    pieces = await answered(
        site, "/v1/completions", prompt=[A, B], max_tokens=3, logprobs=1, echo=True, stream=True
    )
    parts = [p["choices"][0] for p in pieces]
    assert "".join(p["text"] for p in parts) == "abbé"
    joined: dict[str, list[Any]] = {}
    for part in parts:
        for key, values in part["logprobs"].items():
            joined.setdefault(key, []).extend(values)
    assert joined["tokens"] == ["a", "b", "b", "bytes:\\xc3", "bytes:\\xa9"]
    assert joined["text_offset"] == [0, 1, 2, 3, 3]


async def test_tokens_can_be_named_by_id(site: Site) -> None:
    body = await answered(
        site, "/v1/completions", prompt=[A], max_tokens=3, logprobs=0, return_tokens_as_token_ids=True
    )
    assert body["choices"][0]["logprobs"]["tokens"] == [f"token_id:{t}" for t in OUT]


async def test_chat(site: Site) -> None:
    messages = [{"role": "user", "content": "x"}]
    body = await answered(
        site, "/v1/chat/completions", messages=messages, max_tokens=3, logprobs=True, top_logprobs=1
    )
    first, second, third = body["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "b",
        "logprob": -0.5,
        "bytes": [98],
        "top_logprobs": [{"token": "a", "logprob": -0.1, "bytes": [97]}],
    }
    assert bytes(second["bytes"] + third["bytes"]).decode() == "é"
    assert second["token"] == "\ufffd"


async def test_chat_stream(site: Site) -> None:
    messages = [{"role": "user", "content": "x"}]
    pieces = await answered(
        site, "/v1/chat/completions", messages=messages, max_tokens=3, logprobs=True, stream=True
    )
    content = [e for p in pieces if (lp := p["choices"][0]["logprobs"]) for e in lp["content"]]
    assert [e["logprob"] for e in content] == [-0.5, -1.0, -9999.0]
    assert all(e["top_logprobs"] == [] for e in content)


async def test_prompt_logprobs(site: Site) -> None:
    body = await answered(site, "/v1/completions", prompt=[A, B], max_tokens=3, prompt_logprobs=1)
    assert body["choices"][0]["logprobs"] is None
    assert body["choices"][0]["prompt_logprobs"] == [
        None,
        {
            str(B): {"logprob": -2.0, "rank": 2, "decoded_token": "b"},
            str(A): {"logprob": -0.2, "rank": 1, "decoded_token": "a"},
        },
    ]
