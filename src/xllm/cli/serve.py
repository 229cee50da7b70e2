"""`xllm serve MODEL`: one front and its engines on this machine, until SIGTERM or Ctrl-C.

Start-up goes to stderr: where the time went, what memory is taken for what, why each value was
chosen. The first signal drains (running answers end), a second one stops at once. SIGHUP restarts the
engines one by one while requests go on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys

from xllm.cli.serving import SECTIONS, Running, running
from xllm.cli.settings import add_settings, load_settings
from xllm.cli.watching import begin_logging
from xllm.config.load import Loaded
from xllm.errors import ConfigError
from xllm.heap import settle
from xllm.observability.logs import say
from xllm.version import __version__

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, *SECTIONS)


def run(args: argparse.Namespace) -> int:
    loaded = load_settings(args, *SECTIONS)
    begin_logging(loaded)
    return asyncio.run(_serve(loaded))


async def _serve(loaded: Loaded) -> int:
    say(f"xLLM {__version__}: starting")
    life = _Life()
    work = asyncio.create_task(life.run(loaded))
    life.listen(work)
    try:
        await work
    except asyncio.CancelledError:
        say("stopped at once")
        return 130
    say("stopped")
    return 0


class _Life:
    """What a signal means in each part of a server's life."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._server: Running | None = None
        self._restart: asyncio.Task[None] | None = None
        self._had_terminal = sys.stderr.isatty()

    def listen(self, work: asyncio.Task[None]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, work)
        # nohup's wish is respected. SIGQUIT stays what it is: a core dump, and engines die with us.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, self._hang_up, work)

    async def run(self, loaded: Loaded) -> None:
        async with running(loaded, say) as server:
            settle()
            for line in welcome(server):
                say(line)
            self._server = server
            await self._stop.wait()
            self._server = None
            say("draining: running answers may end, nothing new is accepted")
            if self._restart is not None:
                self._restart.cancel()
                await asyncio.gather(self._restart, return_exceptions=True)

    def _end(self, work: asyncio.Task[None]) -> None:
        # Nothing to drain while loading, and a second signal means: now.
        if self._stop.is_set() or self._server is None:
            work.cancel()
        self._stop.set()

    def _hang_up(self, work: asyncio.Task[None]) -> None:
        if self._had_terminal and not os.isatty(sys.stderr.fileno()):
            self._end(work)  # the window was closed: nobody asked for a restart
        elif self._server is None or self._stop.is_set():
            log.warning("SIGHUP: nothing is served now that could be restarted")
        elif self._restart is None or self._restart.done():
            self._restart = asyncio.create_task(_roll(self._server))


async def _roll(server: Running) -> None:
    try:
        server.http.reload_certificate()
    except ConfigError as error:
        log.error("the certificate stays as it is: %s", error.message)  # noqa: TRY400  its text says all
    say("restarting the engines one by one")
    try:
        await server.service.rolling_restart()
    except Exception:
        log.exception("the rolling restart ended early; what was not reached runs on")
    else:
        say("all engines are restarted")


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
