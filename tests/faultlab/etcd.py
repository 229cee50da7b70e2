"""A real etcd server on free loopback ports, for tests: start, kill, stop, continue, start again, wipe."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

START_TIMEOUT_S = 30.0


def etcd_missing() -> str | None:
    """Why no etcd can be started here, or None."""
    if shutil.which("etcd") is None:
        return "there is no etcd binary; install the package etcd-server"
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EtcdServer:
    """One member with a data directory of its own. `start` may be called again after `kill` or `stop`."""

    def __init__(self) -> None:
        self.port, self._peer_port = free_port(), free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="etcd-"))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"etcd://127.0.0.1:{self.port}"

    def start(self) -> None:
        client = f"http://127.0.0.1:{self.port}"
        peer = f"http://127.0.0.1:{self._peer_port}"
        log = (self._folder / "log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [
                    "etcd",
                    *("--name", "one", "--data-dir", str(self._folder / "data")),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", f"one={peer}"),
                    # A store of its own each time it is wiped: the cluster's id follows from this word.
                    *("--initial-cluster-token", f"t{time.monotonic_ns()}"),
                    # Short beats: the least lease follows from the election timeout.
                    *("--heartbeat-interval", "50", "--election-timeout", "500"),
                ],
                stdout=log,
                stderr=log,
            )
        self._wait_ready()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Forget everything, as if the data directory was lost; only while it does not run."""
        shutil.rmtree(self._folder / "data", ignore_errors=True)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def _wait_ready(self) -> None:
        end_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end_s:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError("etcd ended: " + (self._folder / "log").read_text()[-2000:])
            with contextlib.suppress(OSError):
                url = f"http://127.0.0.1:{self.port}/health"
                with urllib.request.urlopen(url, timeout=1.0) as answer:
                    if b"true" in answer.read():
                        return
            time.sleep(0.02)
        raise RuntimeError("etcd did not become healthy")
