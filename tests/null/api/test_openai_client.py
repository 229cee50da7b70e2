"""The official client, unmodified, against a live server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest

from tests.null.api.conftest import MakeSite, Site
from tests.null.api.test_streams import submitted
from xllm.errors import InternalError
from xllm.wire.messages import Abort, Frame

USER = [{"role": "user", "content": "hello"}]


def client_of(site: Site, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key=key, max_retries=0)


@pytest.fixture
async def client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(site) as made:
        yield made


async def test_chat_streaming_and_not(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model="sample", messages=USER, max_completion_tokens=5, seed=1
    )
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    stream = await client.chat.completions.create(
        model="sample",
        messages=USER,
        max_tokens=5,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [c async for c in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


async def test_completions_with_n_and_stop(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="sample", prompt="hello", n=2, max_tokens=9, stop="oh")
    assert [c.text for c in whole.choices] == ["hell", "ell"]
    assert {c.finish_reason for c in whole.choices} == {"stop"}
    stream = await client.completions.create(
        model="sample", prompt="hello", stream=True, stop="oh", max_tokens=9
    )
    assert "".join([c.choices[0].text async for c in stream]) == "hell"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [m.id async for m in client.models.list()] == ["sample"]
    assert (await client.models.retrieve("sample")).id == "sample"


async def test_its_error_classes(client: openai.AsyncOpenAI, make_site: MakeSite) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="sample", prompt="a", temperature=9)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "value_out_of_range",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.completions.create(model="other", prompt="a")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.request_id
    locked = await make_site(api_key=("right",))
    async with client_of(locked, "wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
    async with client_of(locked, "right") as friend:
        assert await friend.models.retrieve("sample")
    full = await make_site(front={"max_num_inflight_reqs": 0})
    async with client_of(full) as late:
        with pytest.raises(openai.RateLimitError) as limited:
            await late.completions.create(model="sample", prompt="a", stream=True)
    assert limited.value.response.headers["retry-after"]


async def test_an_error_in_a_stream_is_raised(make_site: MakeSite) -> None:
    site = await make_site(engine={"auto": False})
    async with client_of(site) as client:
        asked = asyncio.create_task(client.completions.create(model="sample", prompt="a", stream=True))
        spec = await submitted(site.engine)
        site.engine.step()
        stream = await asked
        error = InternalError("broken").info()
        site.engine.say(Frame(request_id=spec.request_id, offset=1, error=error, last=True))
        with pytest.raises(openai.APIError, match="broken"):
            [c async for c in stream]


async def test_closing_a_stream_aborts_the_request(make_site: MakeSite) -> None:
    site = await make_site(engine={"auto": False})
    async with client_of(site) as client:
        asked = asyncio.create_task(client.completions.create(model="sample", prompt="a", stream=True))
        await submitted(site.engine)
        site.engine.step()
        stream = await asked
        await stream.close()
        await site.engine.saw(Abort)
