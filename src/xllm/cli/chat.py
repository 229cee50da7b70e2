"""`xllm chat`: talk to a server at --base-url, or to a model started here for the time of the talk.

A client of the HTTP API in both cases: there is no second way into an engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from xllm.cli.background import background_server
from xllm.cli.bench.online import first_model
from xllm.cli.http_client import Exchange, Server, TransportError, events
from xllm.cli.serving import SECTIONS
from xllm.cli.settings import add_settings, load_settings
from xllm.config import EngineConfig
from xllm.errors import RequestError, UnavailableError

HELP = "An empty line or Ctrl-D ends the talk, Ctrl-C an answer, /clear forgets what was said."


def configure(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, EngineConfig)
    parser.add_argument("--base-url", help="talk to this OpenAI-compatible server instead of starting one")
    parser.add_argument("--api-key", default="", help="bearer key for --base-url")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--temperature", type=float, default=0.7, help="[%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer [%(default)s]")


def run(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        url = args.base_url
        if url is None:
            given = load_settings(args, *SECTIONS)
            # Any free port, loopback only: this server is for this talk.
            loaded = given.override(host="127.0.0.1", port=0, api_key=(), log_level="warning")
            url = stack.enter_context(background_server(loaded, lambda line: print(line, file=sys.stderr)))
        server = Server.parse(url)
        asked = args.model_name if args.base_url else None
        return talk(args, server, asked or asyncio.run(first_model(server, args.api_key)))


def talk(args: argparse.Namespace, server: Server, model: str) -> int:
    """Read a line, stream the answer, repeat."""
    start: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    print(f"{model}. {HELP}")
    for line in _lines():
        if line == "/clear":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = asyncio.run(answer_to(args, server, model, messages))
        except KeyboardInterrupt:
            print(" [stopped]")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
    return 0


def _lines() -> Iterator[str]:
    """What the user types, until an empty line or the end."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            return
        yield line


async def answer_to(
    args: argparse.Namespace, server: Server, model: str, messages: list[dict[str, str]]
) -> str:
    """Stream one answer to stdout and return it. Raises RequestError or UnavailableError."""
    payload: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
    }
    pieces: list[str] = []
    try:
        async with Exchange(server, "POST", "/v1/chat/completions", payload, args.api_key) as response:
            if response.status != 200:
                raise RequestError(_reason(response.status, await response.read()))
            async for data in events(response.body):
                if data == b"[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RequestError(f"the answer broke off: {event['error'].get('message', '')}")
                for choice in event.get("choices", ()):
                    piece = choice.get("delta", {}).get("content") or ""
                    pieces.append(piece)
                    print(piece, end="", flush=True)
    except TransportError as error:
        raise UnavailableError(f"the connection to {server.host}:{server.port} broke") from error
    print()
    return "".join(pieces)


def _reason(status: int, body: bytes) -> str:
    """The server's own message, as far as it is one."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = "no reason given"
    return f"the server refused ({status}): {message}"
