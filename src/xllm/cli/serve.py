"""`xllm serve MODEL`: one front and one engine on this machine, until SIGTERM or Ctrl-C.

Start-up goes to stderr: where the time went, what memory is taken for what, why each value was
chosen. The first signal drains (running answers end), a second one stops at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys

from xllm.cli.serving import SECTIONS, Running, running
from xllm.cli.settings import add_settings, load_settings
from xllm.config import ObservabilityConfig, ServerConfig
from xllm.config.load import Loaded
from xllm.heap import settle
from xllm.observability.logs import setup_logging
from xllm.version import __version__


def configure(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, *SECTIONS)


def run(args: argparse.Namespace) -> int:
    loaded = load_settings(args, *SECTIONS)
    level, log_format = loaded.build(ServerConfig).log_level, loaded.build(ObservabilityConfig).log_format
    setup_logging(level, as_json=log_format == "json")
    return asyncio.run(_serve(loaded))


async def _serve(loaded: Loaded) -> int:
    say(f"xLLM {__version__}: starting")
    stop = asyncio.Event()
    ready = asyncio.Event()
    work = asyncio.create_task(_run_until(stop, ready, loaded))

    def on_signal() -> None:
        # Nothing to drain while loading, and a second signal means: now.
        if stop.is_set() or not ready.is_set():
            work.cancel()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await work
    except asyncio.CancelledError:
        say("stopped at once")
        return 130
    say("stopped")
    return 0


async def _run_until(stop: asyncio.Event, ready: asyncio.Event, loaded: Loaded) -> None:
    async with running(loaded, say) as server:
        settle()
        for line in welcome(server):
            say(line)
        ready.set()
        await stop.wait()
        say("draining: running answers may end, nothing new is accepted")


def welcome(server: Running) -> list[str]:
    """What to do now, with a command that can be pasted."""
    card = server.card
    body = {"model": card.model_id, "messages": [{"role": "user", "content": "Say hello."}]}
    exact = "bitwise reproducible" if card.deterministic else "not bitwise reproducible"
    return [
        f"model {card.model_id}: context {card.max_model_len} tokens, {card.dtype}, "
        f"{card.num_pages} KV pages of {card.page_size} tokens",
        f"numerics class {card.numerics_class[:12]}, {exact}",
        f"try: curl {server.base_url}/v1/chat/completions -H 'content-type: application/json' "
        f"-d '{json.dumps(body)}'",
        # Last: whoever waits for this line has seen all the others.
        f"ready: {server.base_url}",
    ]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
