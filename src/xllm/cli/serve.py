"""`xllm serve MODEL`: one front and one engine on this machine, until SIGTERM or Ctrl-C.

Start-up goes to stderr: where the time went, what memory is taken for what, why each value was
chosen. The first signal drains (running answers end), a second one stops at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys

from xllm.cli.serving import SECTIONS, Running, running
from xllm.cli.settings import add_settings, load_settings
from xllm.config import ServerConfig
from xllm.config.load import Loaded
from xllm.version import __version__


def configure(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, *SECTIONS)


def run(args: argparse.Namespace) -> int:
    loaded = load_settings(args, *SECTIONS)
    level = loaded.build(ServerConfig).log_level
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(levelname).1s %(name)s: %(message)s"
    )
    return asyncio.run(_serve(loaded))


async def _serve(loaded: Loaded) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def on_signal() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    say(f"xLLM {__version__}: starting")
    starting = asyncio.create_task(_run_until(stop, loaded))
    try:
        await starting
    except asyncio.CancelledError:
        say("stopped at once")
        return 130
    say("stopped")
    return 0


async def _run_until(stop: asyncio.Event, loaded: Loaded) -> None:
    async with running(loaded, say) as server:
        for line in welcome(server):
            say(line)
        lost = asyncio.create_task(server.lost())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((lost, stopped), return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        stopped.cancel()
        say("draining: running answers may end, nothing new is accepted")


def welcome(server: Running) -> list[str]:
    """What to do now, with a command that can be pasted."""
    card = server.card
    body = {"model": card.model_id, "messages": [{"role": "user", "content": "Say hello."}]}
    return [
        f"model {card.model_id}: context {card.max_model_len} tokens, {card.dtype}, {card.num_pages} KV pages of "
        f"{card.page_size} tokens, numerics class {card.numerics_class[:12]}"
        f"{'' if card.deterministic else ' (not bitwise reproducible)'}",
        f"ready: {server.base_url}",
        f"try: curl {server.base_url}/v1/chat/completions -H 'content-type: application/json' "
        f"-d '{json.dumps(body)}'",
    ]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
