"""Explanations over HTTP and on the terminal: by every name, in the response on demand, never with text."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from tests.null.api.conftest import MakeSite, Site, error_of, events
from xllm.cli.main import main

EXPLAIN = {"x-xllm-explain": "1"}


async def completion(site: Site, headers: dict[str, str] | None = None, **body: Any) -> Any:
    body = {"model": "sample", "prompt": "hunter2", "max_tokens": 4, **body}
    reply = await site.client.post("/v1/completions", json=body, headers=headers or {})
    assert reply.status_code == 200, reply.text
    return reply


async def told(site: Site, name: str) -> list[dict[str, Any]]:
    reply = await site.client.get(f"/requests/{name}")
    assert reply.status_code == 200, reply.text
    found: list[dict[str, Any]] = reply.json()["requests"]
    return found


def check_sums(request: dict[str, Any]) -> None:
    spent = dict(request["spent_ms"])
    total = spent.pop("total")
    assert total > 0
    assert sum(spent.values()) == pytest.approx(total, abs=0.05)


async def test_a_request_is_found_by_all_its_names(site: Site) -> None:
    reply = await completion(site, {"x-request-id": "mine-1"})
    completion_id = reply.json()["id"]
    (by_client,) = await told(site, "mine-1")
    (by_completion,) = await told(site, completion_id)
    assert by_client == by_completion
    assert completion_id == f"cmpl-{by_client['id']}"
    assert (by_client["client_id"], by_client["outcome"], by_client["instance"]) == (
        *("mine-1", "length", "engine-0"),
    )
    assert by_client["tokens"] == {"prompt": 4, "cached": 0, "completion": 4}
    placed = next(e for e in by_client["events"] if e["kind"] == "placed")
    assert placed["reasons"]
    check_sums(by_client)


async def test_the_id_in_the_response_header_works_when_the_client_gave_none(site: Site) -> None:
    reply = await completion(site)
    assert len(await told(site, reply.headers["x-request-id"])) == 1


@pytest.mark.parametrize("name", ["unknown", "chatcmpl-", "%2e%2e", "x" * 4000])
async def test_unknown_names_are_not_found(site: Site, name: str) -> None:
    reply = await site.client.get(f"/requests/{name}")
    assert reply.status_code == 404
    assert error_of(reply)["code"] == "request_not_found"


@pytest.mark.parametrize("path", ["/instances", "/requests/x"])
async def test_both_are_for_administrators(make_site: MakeSite, path: str) -> None:
    site = await make_site(api_key=("user",), admin_key=("boss",))
    for key, status in (("user", 403), ("wrong", 401), ("boss", 200 if path == "/instances" else 404)):
        reply = await site.client.get(path, headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == status


async def test_the_numbers_ride_in_a_whole_response(site: Site) -> None:
    reply = await completion(site, EXPLAIN, prompt=["hunter2", "hunter2b"])
    requests = reply.json()["xllm"]["requests"]
    assert len(requests) == 2
    for request in requests:
        assert request["state"] == "ended"
        check_sums(request)
    assert "xllm" not in (await completion(site)).json()
    assert "hunter2" not in json.dumps(requests)


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_numbers_ride_in_the_last_chunk_of_a_stream(
    site: Site, path: str, include_usage: bool
) -> None:
    body: dict[str, Any] = {"model": "sample", "max_tokens": 4, "stream": True}
    body |= (
        {"prompt": "hello"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    )
    body["stream_options"] = {"include_usage": include_usage}
    reply = await site.client.post(path, json=body, headers=EXPLAIN)
    *chunks, last, done = events(reply.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert ("usage" in last) == include_usage
    (request,) = last["xllm"]["requests"]
    assert request["tokens"]["completion"] == 4
    check_sums(request)
    assert not any("xllm" in chunk for chunk in chunks)


@pytest.mark.parametrize("value", ["yes", "2", "", "1, 1"])
async def test_a_header_that_is_neither_0_nor_1_is_refused(site: Site, value: str) -> None:
    body = {"model": "sample", "prompt": "a"}
    reply = await site.client.post("/v1/completions", json=body, headers={"x-xllm-explain": value})
    assert reply.status_code == 400
    assert error_of(reply)["param"] == "x-xllm-explain"


async def test_instances_tell_state_and_load(site: Site) -> None:
    await completion(site)
    (instance,) = (await site.client.get("/instances")).json()["instances"]
    assert (instance["id"], instance["model"], instance["state"]) == ("engine-0", "sample", "ready")
    assert instance["load"]["requests"] == 0
    site.engine.crash()
    while (await site.client.get("/ready")).status_code == 200:
        await asyncio.sleep(0)
    listed = (await site.client.get("/instances")).json()["instances"]
    assert [i for i in listed if i["state"] == "ready"] == []


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


async def test_access_and_decision_lines_have_both_names(site: Site) -> None:
    heard = Lines()
    loggers = [logging.getLogger(name) for name in ("xllm.access", "xllm.decisions")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(heard)
        logger.setLevel(logging.INFO)
    try:
        reply = await completion(site, {"x-request-id": "mine-2"})
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(heard)
            logger.setLevel(level)
    inner = reply.json()["id"].removeprefix("cmpl-")
    lines = heard.lines
    (place,) = [line for line in lines if line.startswith("place ")]
    assert f"request={inner}" in place
    assert "client=mine-2" in place
    assert "instance=engine-0" in place
    assert any(f"serves={inner}" in line and "request_id=mine-2" in line for line in lines)
    assert "hunter2" not in "".join(lines)


async def test_the_command_prints_where_the_time_went(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    completion_id = (await completion(site)).json()["id"]
    base = ["explain", completion_id, "--base-url", f"http://127.0.0.1:{site.port}"]
    assert await asyncio.to_thread(main, base) == 0
    printed = capsys.readouterr().out
    for part in (completion_id.removeprefix("cmpl-"), "prefill", "Why engine-0 (attempt 0)", "first output"):
        assert part in printed
    assert await asyncio.to_thread(main, [*base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"][0]["outcome"] == "length"


async def test_the_command_says_what_to_do_when_it_cannot(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str]
) -> None:
    site = await make_site(admin_key=("boss",))
    url = f"http://127.0.0.1:{site.port}"
    assert await asyncio.to_thread(main, ["explain", "x", "--base-url", url]) == 1
    assert "--api-key" in capsys.readouterr().err
    assert await asyncio.to_thread(main, ["explain", "x", "--base-url", url, "--api-key", "boss"]) == 1
    assert "does not know x" in capsys.readouterr().err
    assert await asyncio.to_thread(main, ["explain", "x", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "nothing answers" in capsys.readouterr().err
