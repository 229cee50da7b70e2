"""`xllm chat`, `list` and `pull` as a person meets them, without a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.null.cli.test_bench_serve import END, HEAD, chunk, read_request, serving, sse
from xllm.cli.main import main
from xllm.cli.serving import base_url


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_CACHE_DIR", str(tmp_path / "cache"))


def typing(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    words: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(words)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def delta(text: str) -> bytes:
    return chunk(sse({"choices": [{"index": 0, "delta": {"content": text}}]}))


async def test_a_talk_keeps_its_history_until_it_is_cleared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[dict[str, str]]] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        messages = body["messages"]
        assert isinstance(messages, list)
        asked.append(messages)
        writer.write(HEAD + delta("Hel") + delta("lo") + chunk(sse("[DONE]")) + END)
        await writer.drain()

    typing(monkeypatch, "one", "two", "/clear", "three")
    async with serving(handler) as target:
        words = ["chat", "m", "--base-url", f"http://127.0.0.1:{target.server.port}", "--system", "be kind"]
        code = await asyncio.to_thread(main, words)
    assert code == 0
    said = [[message["content"] for message in messages] for messages in asked]
    assert said == [["be kind", "one"], ["be kind", "one", "Hello", "two"], ["be kind", "three"]]
    assert capsys.readouterr().out.count("Hello") == 3


async def test_a_refusal_is_shown_in_the_servers_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        body = json.dumps({"error": {"message": "bad key", "code": "invalid_api_key"}}).encode()
        writer.write(f"HTTP/1.1 401 No\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    typing(monkeypatch, "hello")
    async with serving(handler) as target:
        code = await asyncio.to_thread(
            main, ["chat", "m", "--base-url", f"http://127.0.0.1:{target.server.port}"]
        )
    assert code == 1
    assert "(401): bad key" in capsys.readouterr().err


def test_list_names_the_default_model_and_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "smollm2" in printed
    assert "xllm pull smollm2" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pull", "smolm2"], "did you mean smollm2"),
        (["serve"], "name a model"),
        (["serve", "m", "--dtype", "int3"], "float32"),
        (["serve", "m", "--port", "x"], "port"),
        (["bench", "throughput"], "name a model"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8"),
        ("0.0.0.0", "http://127.0.0.1:8"),
        ("::", "http://[::1]:8"),
        ("localhost", "http://localhost:8"),
    ],
)
def test_the_address_shown_is_one_that_a_client_can_use(host: str, url: str) -> None:
    assert base_url(host, 8) == url
