"""A whole server on a thread of its own, for commands that are its client in the same process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from xllm.cli.serving import Say, running
from xllm.config.load import Loaded


@contextmanager
def background_server(loaded: Loaded, say: Say) -> Iterator[str]:
    """Start, yield the base URL, end. Errors while starting are raised here.

    The thread lives as long as the engine does: the kernel ends an engine with the thread that made it.
    """
    ready: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    # A daemon: Ctrl-C while a model loads must not wait for it; the engine ends with this process.
    thread = threading.Thread(target=_run, args=(loaded, say, ready), name="xllm-server", daemon=True)
    thread.start()
    url, loop, stop = ready.result()
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def _run(
    loaded: Loaded, say: Say, ready: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]]
) -> None:
    try:
        asyncio.run(_serve(loaded, say, ready))
    except BaseException as error:  # handed over to the thread that waits; nothing is lost
        if ready.done():
            raise
        ready.set_exception(error)


async def _serve(
    loaded: Loaded, say: Say, ready: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]]
) -> None:
    stop = asyncio.Event()
    # For this program alone, on a port of its own: a certificate is for names that it is not called by.
    async with running(loaded.override(ssl_certfile=None, ssl_keyfile=None), say) as server:
        ready.set_result((server.base_url, asyncio.get_running_loop(), stop))
        await stop.wait()
