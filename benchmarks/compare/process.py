"""An engine's process tree: started in a session of its own, its CPU time read, ended whole.

Knows nothing of protocols. Only processes started here are ever signalled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


class EngineFailed(Exception):
    """The engine did not start, or ended. The message carries the end of its log."""


class Tree:
    """One running engine. `log` gets its stderr, and stdout too unless `talk` makes that a pipe."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], log: Path, *, talk: bool = False
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                list(command),
                env=os.environ | dict(env),
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else sink,
                stderr=sink,
                # A group of its own: engines start children, and none may outlive the measurement.
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises EngineFailed if the process has ended."""
        if self.process.poll() is not None:
            raise EngineFailed(f"ended with code {self.process.returncode}: {self.last_line()}")

    def last_line(self) -> str:
        """Of the log, which mostly says what was wrong; with the log's name for the rest."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        told = [line.strip() for line in lines if line.strip()]
        return f"{told[-1][:300] if told else 'nothing was said'} [{self.log}]"

    def cpu_s(self) -> float:
        """CPU seconds of all its processes that are alive."""
        total = 0.0
        for process in self._members():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes: shared pages count once."""
        total = 0
        for process in self._members():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM, then SIGKILL to whatever of the group is left; idempotent."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _members(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []


def end_in_order() -> None:
    """Make SIGTERM unwind this program as Ctrl-C does: what it has started ends with it."""

    def leave(_number: int, _frame: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, leave)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
