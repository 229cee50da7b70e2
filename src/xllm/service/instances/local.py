"""An engine process on this machine, over a socket pair: start it, watch it, end it.

The process dies with the front (the child asks the kernel for that, and EOF ends it). Which
requests run on it is the front's matter, starting it again the supervisor's.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from xllm.config import EngineConfig
from xllm.config.env import engine_environment
from xllm.errors import UnavailableError
from xllm.service.failover.blame import DeathCause
from xllm.service.instances.handshake import (
    OnAssets,
    OnProgress,
    ignore_assets,
    ignore_progress,
    start_engine,
)
from xllm.service.instances.restart import cause_of_death
from xllm.types import ModelCard
from xllm.wire.messages import Drain
from xllm.wire.stream import EngineStream, SocketEngineStream

log = logging.getLogger(__name__)

ENGINE = ("-m", "xllm.engine.process")
PROGRAM = ENGINE
"""What the child runs; tests put another program that speaks the wire in its place."""

_PEER_KEY = secrets.token_bytes(32)
"""What engines of this process prove to each other before they exchange pages; it ends with them all."""

POLL_S = 0.01
EXIT_GRACE_S = 5.0
"""Between the end of the connection and SIGKILL."""
CAUSE_WAIT_S = 0.25
"""For the status of a process whose connection has ended: the kernel closes files before it tells."""


class LocalEngine:
    """A loaded engine. `stream` is handed to `Front.add_instance`, which then owns its reading."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        stream: EngineStream,
        card: ModelCard,
        report: tuple[str, ...],
        max_reqs: int,
        incarnation: str = "",
        endpoints: tuple[str, ...] = (),
    ) -> None:
        self.stream = stream
        self.card = card
        self.report = report
        self.max_reqs = max_reqs
        self.incarnation = incarnation
        self.endpoints = endpoints
        self.silent = False
        # An engine of ours pulses from the start: one that is stopped before its first pulse is silent, too.
        self.pulses = PROGRAM == ENGINE
        self._process = process

    @classmethod
    async def launch(
        cls,
        config: EngineConfig,
        on_progress: OnProgress = ignore_progress,
        on_assets: OnAssets = ignore_assets,
        *,
        timeout_s: float = 600.0,
        log_level: str = "warning",
        pages_fd: int | None = None,
    ) -> LocalEngine:
        """Start the process and wait until it has loaded. `pages_fd`: memory for KV pages that outlives it.

        Must be called on a thread that lives as long as the engine: the kernel ends the child with
        the thread that made it. Raises as `start_engine`; no process is left behind then.
        """
        ours, theirs = socket.socketpair()
        try:
            process = _spawn(theirs.fileno(), log_level, pages_fd)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        stream = await SocketEngineStream.over(ours)
        try:
            ready = await start_engine(
                stream,
                config,
                timeout_s=timeout_s,
                on_progress=on_progress,
                on_assets=on_assets,
                peer_key=_PEER_KEY,
            )
        except BaseException as error:
            await stream.close()
            # StartFailed is on its way out by itself; anything else is stuck and holds memory.
            code = await asyncio.shield(_reap(process, EXIT_GRACE_S))
            if isinstance(error, UnavailableError):
                log.error("engine %d ended with code %d while it loaded", process.pid, code)
            raise
        scheduler = config.scheduler
        max_reqs = scheduler.max_num_seqs + scheduler.max_num_queued_reqs
        return cls(process, stream, ready.card, ready.report, max_reqs, ready.incarnation, ready.endpoints)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative = the signal that ended it."""
        return self._process.poll()

    async def cause(self) -> DeathCause:
        """What is to be held against the requests it has: to be asked when it is suspect or lost.

        Where it still runs after a moment, it is what it looks like now: stopped, silent, or neither.
        """
        stopped = self.stopped()
        if not self.silent and not stopped:
            await _wait(self._process, CAUSE_WAIT_S)
        return cause_of_death(self.exit_code, stopped=stopped, silent=self.silent)

    def stopped(self) -> bool:
        """Whether a signal or a debugger has stopped the process; False where that cannot be told."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        # The name before it may hold anything, also spaces and brackets.
        return stat.rpartition(")")[2].split()[:1] in (["T"], ["t"])

    def kill(self) -> None:
        """SIGKILL, for one that makes no progress; EOF follows."""
        self.silent = not self.stopped()
        log.error("engine %d makes no progress and is killed", self.pid)
        self._process.kill()

    async def terminate(self, drain_s: float = 0.0) -> int:
        """End the process and return its exit code: drain, then EOF, then SIGKILL; idempotent.

        With `drain_s` the engine may first finish what runs; nobody may have closed `stream` then.
        """
        if self.exit_code is None and drain_s > 0:
            try:
                await self.stream.send(Drain())
                await _wait(self._process, drain_s)
            except ConnectionError:
                log.debug("engine %d: gone before it could drain", self.pid)
        await self.stream.close()
        return await _reap(self._process, EXIT_GRACE_S)


def _spawn(fd: int, log_level: str, pages_fd: int | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, *PROGRAM, "--fd", str(fd), "--log-level", log_level]
    inherited: Sequence[int] = (fd,)
    if pages_fd is not None:
        command += ["--pages-fd", str(pages_fd)]
        inherited = (fd, pages_fd)
    # A group of its own: Ctrl-C in a terminal reaches the front alone, which then drains. Its output
    # goes to our stderr, so that it never mixes with what a program using us prints.
    return subprocess.Popen(
        command,
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        stdout=sys.__stderr__ or subprocess.DEVNULL,
        process_group=0,
        env=engine_environment(),
    )


async def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Whether the process ended within the time.

    Polls: at a program's exit no thread can be had any more to wait in, and that is when LLM ends.
    """
    end_s = asyncio.get_running_loop().time() + timeout_s
    while process.poll() is None:
        if asyncio.get_running_loop().time() >= end_s:
            return False
        await asyncio.sleep(POLL_S)
    return True


async def _reap(process: subprocess.Popen[bytes], grace_s: float) -> int:
    if not await _wait(process, grace_s):
        log.warning("engine %d did not end by itself; killing it", process.pid)
        process.kill()
    return process.wait()
