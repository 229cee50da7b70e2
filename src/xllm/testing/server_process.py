"""`xllm serve`, `service` and `instance` as a user runs them, each in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

READY = "ready: "


class ServerProcess:
    """A running server. `lines` is everything it printed to stderr so far.

    `base_url` is what it called ready: of an instance, the address that fronts connect to.
    """

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        command: str = "serve",
        within: Sequence[str] = (),
    ) -> None:
        """`within`: words of a command that runs the rest of its words, such as a shell in a container."""
        port = () if command == "instance" else ("--port", "0")
        words = [*within, sys.executable, "-m", "xllm.cli.main", command, *args, *port]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        self.base_url = ""
        self._urls: queue.Queue[str | None] = queue.Queue()
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self, timeout_s: float = 300.0) -> None:
        """Block until the server accepts requests. Raises RuntimeError with its output if it ended."""
        url = self._urls.get(timeout=timeout_s)
        if url is None:
            raise RuntimeError("the server ended while starting:\n" + "\n".join(self.lines))
        self.base_url = url

    def wait_line(self, text: str, *, since: int = 0, timeout_s: float = 60.0) -> str:
        """The first line from number `since` on that holds `text`, as soon as it is there."""

        def found() -> str | None:
            return next((line for line in self.lines[since:] if text in line), None)

        with self._news:
            if not self._news.wait_for(found, timeout_s):
                raise RuntimeError(f"no line with {text!r} came:\n" + "\n".join(self.lines[since:]))
        return found() or ""

    def engine_pids(self) -> list[int]:
        """Processes of the engines that run now, the longest running first."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        pids: list[int] = []
        for pid in children:
            with contextlib.suppress(OSError):  # it has ended since
                if b"--fd" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    pids.append(int(pid))
        return pids

    @property
    def port(self) -> int:
        return int(self.base_url.rsplit(":", 1)[1])

    @property
    def pid(self) -> int:
        return self.process.pid

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, label sets as part of the name."""
        text = httpx.get(f"{self.base_url}/metrics", timeout=30).text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def metric(self, name: str) -> float:
        """Sum over the label sets of one metric; KeyError if there is none."""
        found = [v for k, v in self.metrics().items() if k == name or k.startswith(name + "{")]
        if not found:
            raise KeyError(name)
        return sum(found)

    def count(self, name: str) -> float:
        """As `metric`, for counters that appear with their first event: 0 until then."""
        found = self.metrics()
        return sum(v for k, v in found.items() if k == name or k.startswith(name + "{"))

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM and wait; SIGKILL after `timeout_s`. The exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5.0)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return self.process.returncode

    def _read(self) -> None:
        stream = self.process.stderr
        if stream is None:
            return
        for line in stream:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
            if line.startswith(READY):
                self._urls.put(line[len(READY) :].strip())
        self._urls.put(None)


@contextlib.contextmanager
def serve(*args: str, env: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """A server with these arguments, ready; ended in order afterwards."""
    server = ServerProcess(args, env)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
