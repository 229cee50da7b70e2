"""More prompts in one request than there is room for: they follow as the others end, in their places."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.null.api.conftest import MakeSite, Site, error_of, events
from tests.null.api.test_streams import submitted
from xllm.wire.messages import Abort, Submit

PROMPTS = [f"prompt {n:02d}" for n in range(20)]


@pytest.fixture
async def small(make_site: MakeSite) -> Site:
    made: Site = await make_site(front={"max_num_inflight_reqs": 4})
    return made


async def test_every_prompt_gets_its_answer_in_its_place(small: Site) -> None:
    body = {"prompt": PROMPTS, "max_tokens": 9, "temperature": 0, "n": 2}
    whole = (await small.client.post("/v1/completions", json=body)).json()
    texts = [c["text"] for c in whole["choices"]]
    # The engine says the prompt again.
    assert all(text.startswith(prompt) for text, prompt in zip(texts[::2], PROMPTS, strict=True))
    assert [c["index"] for c in whole["choices"]] == list(range(40))
    assert whole["usage"]["completion_tokens"] == 20 * 2 * 9
    assert len(await small.engine.saw(Submit, 20)) == 20
    assert small.front.snapshot().num_refused > 0  # there was no room at first
    streamed = await small.client.post("/v1/completions", json={**body, "stream": True})
    pieces: dict[int, str] = {}
    for event in events(streamed.text)[:-1]:
        for choice in event["choices"]:
            pieces[choice["index"]] = pieces.get(choice["index"], "") + choice["text"]
    assert [pieces[i] for i in range(40)] == texts


async def test_it_leaves_room_for_others_while_it_goes_on(make_site: MakeSite) -> None:
    site = await make_site(engine={"auto": False}, front={"max_num_inflight_reqs": 4})
    body = {"prompt": PROMPTS, "max_tokens": 3, "temperature": 0}
    asked = asyncio.create_task(site.client.post("/v1/completions", json=body))
    await submitted(site.engine, 4)
    full = await site.client.post("/v1/completions", json={"prompt": "other", "max_tokens": 1})
    assert full.status_code == 429
    while site.engine.request_ids:
        site.engine.step()  # the first four end
    await submitted(site.engine, 6)
    other = asyncio.create_task(
        site.client.post("/v1/completions", json={"prompt": "other", "max_tokens": 1})
    )
    while not (asked.done() and other.done()):
        assert len(site.engine.request_ids) <= 3
        site.engine.step()
        await asyncio.sleep(0)
    assert (await other).status_code == 200
    choices = (await asked).json()["choices"]
    assert [c["index"] for c in choices] == list(range(20))
    assert all(c["text"] and PROMPTS[0].startswith(c["text"]) for c in choices)


async def test_with_no_room_at_all_the_whole_is_refused(make_site: MakeSite) -> None:
    site = await make_site(front={"max_num_inflight_reqs": 0})
    response = await site.client.post("/v1/completions", json={"prompt": PROMPTS})
    assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")
    assert int(response.headers["retry-after"]) >= 1


async def test_a_mistake_in_a_late_prompt_is_told_before_anything_runs_on(make_site: MakeSite) -> None:
    site = await make_site(engine={"auto": False}, front={"max_num_inflight_reqs": 4})
    body = {"prompt": [*([10, 11, 12] for _ in range(20)), [10, 100_000]], "max_tokens": 5}
    response = await site.client.post("/v1/completions", json=body)
    assert response.status_code == 400
    error_of(response)
    await site.engine.saw(Abort, 4)
    assert site.front.snapshot().num_inflight_reqs == 0


@pytest.mark.parametrize("how", ["leaves", "deadline", "engine"])
async def test_what_was_not_submitted_ends_with_the_rest(make_site: MakeSite, how: str) -> None:
    site = await make_site(
        engine={"auto": False}, front={"max_num_inflight_reqs": 4, "recovery_grace_s": 0.0}
    )
    body = {"prompt": PROMPTS, "max_tokens": 5}
    headers = {"x-request-timeout": "0.3"} if how == "deadline" else {}
    asked: Any = asyncio.create_task(site.client.post("/v1/completions", json=body, headers=headers))
    await submitted(site.engine, 4)
    if how == "leaves":
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    else:
        if how == "engine":
            site.engine.crash()
        response = await asked
        assert response.status_code == {"deadline": 408, "engine": 503}[how]
    while site.front.snapshot().num_inflight_reqs:
        await asyncio.sleep(0.005)
    while any("_feed" in repr(t.get_coro()) for t in asyncio.all_tasks()):
        await asyncio.sleep(0.005)
    # One may have followed in the moment between the first end and the reader's hearing of it.
    assert len([m for m in site.engine.received if isinstance(m, Submit)]) <= 5
