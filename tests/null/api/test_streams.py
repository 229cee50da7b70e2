"""Event streams: their shape, when they may begin, how they fail, and what happens when a reader leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.null.api.conftest import MakeSite, Site, error_of, events
from xllm.api import sse
from xllm.api.openai import streaming
from xllm.errors import CapacityError, InternalError
from xllm.testing.fake_engine import SampleEngine
from xllm.types import RequestSpec
from xllm.wire.messages import Abort, Frame, Submit

BODY = {"model": "sample", "prompt": "hello", "max_tokens": 6}


def post(path: str, body: dict[str, Any], version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def submitted(engine: SampleEngine, count: int = 1) -> RequestSpec:
    message = (await engine.saw(Submit, count))[-1]
    assert isinstance(message, Submit)
    return message.spec


@pytest.fixture
async def slow(make_site: MakeSite) -> Site:
    """A site whose engine says nothing until the test says so."""
    site: Site = await make_site(engine={"auto": False})
    return site


async def test_the_text_of_a_stream_is_the_text_of_the_whole(site: Site) -> None:
    for n in (1, 3):
        whole = (await site.complete(n=n)).json()
        pieces = events((await site.complete(n=n, stream=True)).text)
        assert pieces.pop() == "[DONE]"
        for choice in whole["choices"]:
            mine = [c for p in pieces for c in p["choices"] if c["index"] == choice["index"]]
            assert "".join(c["text"] for c in mine) == choice["text"]
            assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]
        assert len({p["id"] for p in pieces}) == 1


@given(text=st.text(), name=st.text())
def test_an_event_made_around_its_text_is_the_event(text: str, name: str) -> None:
    def value(content: str) -> dict[str, Any]:
        return {"model": name, "choices": [{"delta": {"content": content}, "stop": None}], "usage": None}

    assert sse.TextEvent(value)(text) == sse.event(value(text))


@pytest.mark.parametrize("usage", [False, True])
async def test_pieces_of_text_look_the_same_whether_or_not_more_is_told(site: Site, usage: bool) -> None:
    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    for ask in (site.complete, site.chat):
        plain = events((await ask(n=2, stream=True, max_tokens=9, **more)).text)
        told = events((await ask(n=2, stream=True, max_tokens=9, return_token_ids=True, **more)).text)
        assert list(map(shape, plain)) == [s for s in map(shape, told) if s is not None]


def shape(piece: Any) -> Any:
    """An event without what is told only on request and what differs from request to request, in order."""
    if piece == "[DONE]":
        return piece
    choices = [{k: v for k, v in c.items() if not k.endswith("token_ids")} for c in piece["choices"]]
    if any(not (c.get("text") or c.get("delta") or c["finish_reason"]) for c in choices):
        return None  # told for its token only
    if any(c.get("delta") == {"content": ""} for c in choices):
        return None
    kept = {k: v for k, v in piece.items() if k not in ("id", "created", "prompt_token_ids")}
    return json.dumps(kept | {"choices": choices})


async def test_a_chat_stream_opens_each_choice_with_a_role(site: Site) -> None:
    pieces = events((await site.chat(n=2, stream=True, max_tokens=4)).text)[:-1]
    for index in (0, 1):
        mine = [c for p in pieces for c in p["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in c["delta"] for c in mine[1:])
        assert mine[-1]["finish_reason"] in {"length", "stop"}
    assert {p["object"] for p in pieces} == {"chat.completion.chunk"}


async def test_usage_comes_last_with_no_choices_and_only_when_asked_for(site: Site) -> None:
    for ask in (site.complete, site.chat):
        plain = events((await ask(stream=True)).text)[:-1]
        assert all("usage" not in p for p in plain)
        told = events((await ask(stream=True, stream_options={"include_usage": True})).text)[:-1]
        assert told[-1]["choices"] == []
        assert told[-1]["usage"] == (await ask()).json()["usage"]
        assert all(p["usage"] is None for p in told[:-1])


async def test_continuous_usage_counts_up(site: Site) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    pieces = events((await site.complete(stream=True, stream_options=options)).text)[:-1]
    counts = [p["usage"]["completion_tokens"] for p in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == 16


async def test_prompts_of_one_request_are_choices_in_order(site: Site) -> None:
    whole = (await site.complete(prompt=["aa", "bb"], n=2, max_tokens=2, return_token_ids=True)).json()
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    assert len({tuple(c["prompt_token_ids"]) for c in whole["choices"]}) == 2
    pieces = events((await site.complete(prompt=["aa", "bb"], n=2, max_tokens=2, stream=True)).text)[:-1]
    for choice in whole["choices"]:
        mine = [c["text"] for p in pieces for c in p["choices"] if c["index"] == choice["index"]]
        assert "".join(mine) == choice["text"]


async def test_token_ids_are_returned_when_asked_for(site: Site) -> None:
    body = {"prompt": [70, 71], "max_tokens": 3, "return_token_ids": True}
    whole = (await site.complete(**body)).json()["choices"][0]
    assert (whole["prompt_token_ids"], whole["token_ids"]) == ([70, 71], [70, 71, 70])
    pieces = events((await site.complete(stream=True, **body)).text)[:-1]
    assert [t for p in pieces for t in p["choices"][0]["token_ids"]] == [70, 71, 70]
    chat = (await site.chat(max_tokens=3, return_token_ids=True)).json()
    assert len(chat["choices"][0]["token_ids"]) == 3
    assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]


async def test_text_that_looks_like_an_event_stays_text(make_site: MakeSite) -> None:
    evil = "\n\ndata: [DONE]\n\n"
    ids = tuple(3 + b for b in evil.encode())
    site = await make_site(engine={"script": lambda spec, choice: (*ids, 2)})
    pieces = events((await site.complete(stream=True, max_tokens=50)).text)
    assert "".join(p["choices"][0]["text"] for p in pieces[:-1]) == evil


@pytest.mark.parametrize(
    ("error", "status"),
    [(CapacityError("full", retry_after_s=3.0), 429), (InternalError("broken"), 500)],
)
async def test_an_error_before_the_first_token_has_its_own_status(
    slow: Site, error: Any, status: int
) -> None:
    for path, stream in (("/v1/completions", True), ("/v1/completions", False)):
        asked = asyncio.create_task(slow.client.post(path, json={**BODY, "stream": stream}))
        spec = await submitted(slow.engine, 1 + (not stream))
        slow.engine.say(Frame(request_id=spec.request_id, error=error.info(), last=True))
        response = await asked
        assert response.status_code == status
        assert error_of(response)["code"] == error.code
        assert response.headers.get("retry-after") == ("3" if status == 429 else None)


async def test_an_error_after_the_first_token_is_an_event_and_the_end(slow: Site) -> None:
    for path, key in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        value = "hello" if key == "prompt" else [{"role": "user", "content": "x"}]
        asked = asyncio.create_task(slow.client.post(path, json={key: value, "stream": True}))
        await submitted(slow.engine, 1 + (key == "messages"))
        slow.engine.step()
        (request_id,) = slow.engine.request_ids
        error = InternalError("broken").info()
        slow.engine.say(Frame(request_id=request_id, offset=1, error=error, last=True))
        response = await asked
        assert response.status_code == 200
        last = events(response.text)[-1]
        assert last == {
            "error": {"message": "broken", "type": "server_error", "param": None, "code": "internal_error"}
        }
        slow.engine._requests.clear()


async def test_the_head_is_sent_after_a_moment_even_without_a_token(
    slow: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PEEK_S", 0.01)
    reader, _ = await slow.raw(post("/v1/completions", {**BODY, "stream": True}))
    assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    assert slow.engine.num_steps == 0


async def test_quiet_streams_are_kept_alive_by_comments(slow: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PEEK_S", 0.01)
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    reader, _ = await slow.raw(post("/v1/completions", {**BODY, "stream": True}))
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readuntil(b":\n\n\r\n") == b"3\r\n:\n\n\r\n"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rude", [True, False])
async def test_a_client_that_leaves_aborts_its_request(
    slow: Site, stream: bool, steps: int, rude: bool
) -> None:
    _, writer = await slow.raw(post("/v1/completions", {**BODY, "stream": stream}))
    spec = await submitted(slow.engine)
    for _ in range(steps):
        slow.engine.step()
    writer.transport.abort() if rude else writer.close()
    (abort,) = await slow.engine.saw(Abort)
    assert isinstance(abort, Abort)
    assert abort.request_id == spec.request_id
    assert slow.front.snapshot().num_inflight_reqs == 0


async def test_a_client_that_leaves_takes_all_its_prompts_along(slow: Site) -> None:
    _, writer = await slow.raw(post("/v1/completions", {**BODY, "prompt": ["a", "b", "c"], "stream": True}))
    await submitted(slow.engine, 3)
    writer.transport.abort()
    await slow.engine.saw(Abort, 3)
    assert slow.front.snapshot().num_inflight_reqs == 0


async def test_a_half_closed_client_still_gets_its_answer(slow: Site) -> None:
    reader, writer = await slow.raw(post("/v1/completions", BODY))
    await submitted(slow.engine)
    writer.write_eof()
    # The server asks whether anybody is there before it goes on.
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    while slow.engine.request_ids:
        slow.engine.step()
    assert b"HTTP/1.1 200 OK" in await reader.read()


async def test_a_deadline_header_ends_the_request(slow: Site) -> None:
    response = await slow.client.post("/v1/completions", json=BODY, headers={"x-request-timeout": "0.01"})
    assert (response.status_code, error_of(response)["code"]) == (408, "deadline_exceeded")
    await slow.engine.saw(Abort)


async def test_an_engine_that_dies_gives_503_and_not_ready(make_site: MakeSite) -> None:
    slow = await make_site(engine={"auto": False}, front={"recovery_grace_s": 0.0})
    asked = asyncio.create_task(slow.client.post("/v1/completions", json=BODY))
    await submitted(slow.engine)
    slow.engine.crash()
    response = await asked
    assert (response.status_code, error_of(response)["type"]) == (503, "service_unavailable_error")
    assert response.headers["retry-after"]
    for path, status in (("/health", 503), ("/ready", 503), ("/live", 200)):
        assert (await slow.client.get(path)).status_code == status
