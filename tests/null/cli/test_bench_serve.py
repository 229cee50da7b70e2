"""The load generator against a scripted server: what it measures, and what it makes of failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from xllm.cli.bench.datasets import Ask
from xllm.cli.bench.generator import Target, run_load, send
from xllm.cli.bench.metrics import Outcome
from xllm.cli.http_client import Server
from xllm.cli.main import main
from xllm.clock import SystemClock

LATENCIES = ("ttft", "tpot", "itl", "e2el")
ASK = Ask(prompt="hello", output_len=3)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class StepClock:
    """Moves only when the script says so, so that latencies are exact."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return 0.0


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Target]:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(once, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Target(server=Server.parse(f"http://127.0.0.1:{port}/v1"), model="m")


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, object]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
    body = await reader.readexactly(length)
    return head, json.loads(body) if body else {}


def sse(payload: object) -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return f"data: {text}\n\n".encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def text(piece: str) -> bytes:
    return sse({"choices": [{"index": 0, "text": piece}]})


USAGE = sse({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}})


def plain(*parts: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"".join(parts))
        await writer.drain()

    return handler


async def one(handler: Handler) -> Outcome:
    async with serving(handler) as target:
        return await send(target, ASK, SystemClock(), 0.0)


async def test_latencies_are_the_gaps_between_chunks_with_text() -> None:
    clock = StepClock()
    arrived = asyncio.Event()

    class Reporting(StepClock):
        """Tells the script that the client has looked at the clock, that is, has read a chunk."""

        def monotonic_s(self) -> float:
            arrived.set()
            return clock.now_s

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD)
        empty = sse({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for at_s, data in [(0.5, empty), (1.0, text("a")), (1.25, text("b")), (2.0, text("c")), (2.5, USAGE)]:
            arrived.clear()
            clock.now_s = at_s
            writer.write(chunk(data))
            await writer.drain()
            await arrived.wait()
        writer.write(chunk(sse("[DONE]")) + END)
        await writer.drain()

    async with serving(handler) as target:
        outcome = await send(target, ASK, Reporting(), 0.0)
    assert outcome.error == ""
    assert outcome.ttft_s == 1.0
    assert outcome.itls_s == [0.25, 0.75]
    assert outcome.e2el_s == 2.5
    assert outcome.tpot_s == pytest.approx(1.5 / 3)
    assert (outcome.num_input_tokens, outcome.num_output_tokens, outcome.text) == (5, 4, "abc")


async def test_events_may_be_cut_anywhere_by_the_transport() -> None:
    stream = text("ä") + b": keep-alive\n\n" + text("b").replace(b"\n", b"\r\n") + USAGE + sse("[DONE]")
    cut = b"".join(chunk(stream[i : i + 3]) for i in range(0, len(stream), 3))
    outcome = await one(plain(HEAD, cut, END))
    assert (outcome.text, outcome.num_output_tokens, outcome.error) == ("äb", 4, "")


async def test_without_usage_chunks_are_counted_as_tokens() -> None:
    outcome = await one(plain(HEAD, chunk(text("a") + text("b") + sse("[DONE]")), END))
    assert outcome.num_output_tokens == 2


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\n{}"], "HTTP 429"),
        ([HEAD, chunk(text("a")), END], "stream ended without [DONE]"),
        ([HEAD, chunk(text("a")), b"zz"], "body cut short"),
        ([HEAD, chunk(text("a")), b"ff\r\nshort"], "body cut short"),
        ([HEAD, chunk(sse({"error": {"message": "x"}})), END], "error event in the stream"),
        ([HEAD, chunk(b"data: {oops\n\n"), END], "an event that is not JSON"),
        ([b"SSH-2.0\r\n"], "EOFError"),
        ([], "EOFError"),
    ],
    ids=["status", "no-done", "bad-chunk", "short-chunk", "error-event", "bad-json", "not-http", "closed"],
)
async def test_a_failure_becomes_the_outcomes_error(parts: list[bytes], error: str) -> None:
    outcome = await one(plain(*parts))
    assert outcome.error == error
    assert not outcome.ok


async def test_a_refused_connection_is_an_outcome_too() -> None:
    async with serving(plain()) as target:
        pass
    outcome = await send(target, ASK, SystemClock(), 0.0)
    assert outcome.error == "ConnectionRefusedError"


async def test_the_payload_asks_for_usage_and_fixed_lengths() -> None:
    seen: list[dict[str, object]] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await read_request(reader)
        assert head.startswith("POST /v1/chat/completions HTTP/1.1")
        assert "Authorization: Bearer k" in head
        seen.append(body)
        writer.write(HEAD + chunk(sse("[DONE]")) + END)
        await writer.drain()

    async with serving(handler) as target:
        chat = Target(server=target.server, model="m", chat=True, api_key="k")
        outcome = await send(chat, ASK, SystemClock(), 0.0)
    assert outcome.error == ""
    assert seen[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert seen[0]["max_tokens"] == 3
    assert seen[0]["ignore_eos"] is True
    assert seen[0]["stream_options"] == {"include_usage": True}


async def test_no_more_than_max_concurrency_requests_are_open() -> None:
    running = peak = 0
    full = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await read_request(reader)
        if running == 2:
            full.set()
        await full.wait()
        running -= 1
        writer.write(HEAD + chunk(text("a") + sse("[DONE]")) + END)
        await writer.drain()

    async with serving(handler) as target:
        outcomes = await run_load(target, [ASK] * 6, [0.0] * 6, SystemClock(), max_concurrency=2)
    assert peak == 2
    assert [outcome.error for outcome in outcomes] == [""] * 6


async def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        if head.startswith("GET /v1/models"):
            body = json.dumps({"data": [{"id": "found"}]}).encode()
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        else:
            writer.write(HEAD + chunk(text("a") + text("b") + USAGE + sse("[DONE]")) + END)
        await writer.drain()

    result = tmp_path / "r.json"
    async with serving(handler) as target:
        url = f"http://127.0.0.1:{target.server.port}"
        words = ["bench", "serve", "--base-url", url, "--num-prompts", "4", "--input-len", "3"]
        words += ["--request-rate", "1000", "--goodput", "e2el:60000", "--json", str(result)]
        code = await asyncio.to_thread(main, words)
    assert code == 0
    printed = capsys.readouterr().out
    assert "TTFT" in printed
    assert "Goodput" in printed
    data = json.loads(result.read_text())
    assert data["model_id"] == "found"
    assert (data["completed"], data["failed"], data["total_output_tokens"]) == (4, 0, 16)
    vllm_keys = {
        "date", "backend", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness",
        "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
        "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "input_lens",
        "output_lens", "ttfts", "itls", "latencies", "start_times", "generated_texts", "errors",
        "max_output_tokens_per_s", "max_concurrent_requests",
        *(f"{stat}_{n}_ms" for stat in ("mean", "median", "std", "p99") for n in LATENCIES),
    }  # fmt: skip
    assert vllm_keys <= set(data)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base-url", "http://127.0.0.1:9", "--num-prompts", "1"], "nothing answers"),
        (["--base-url", "ftp://x"], "http://HOST:PORT"),
        (["--dataset-name", "custom"], "--dataset-path"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--goodput", "x:1"], "--goodput"),
        (["--request-rate", "0"], "request rate"),
    ],
)
def test_wrong_use_is_one_line_with_a_remedy(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *words]) in (1, 2)
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
