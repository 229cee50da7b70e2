"""An instance as a process: what signals do to it, and that its key stays out of its arguments and logs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.null.wire.peers import FrontEnd
from xllm.config import ClusterConfig
from xllm.service.instances.handshake import attach
from xllm.testing.instance_process import LISTENING
from xllm.testing.null_engine import spec
from xllm.types import FinishReason
from xllm.wire.hello import FRONT, Identity, parse_address
from xllm.wire.messages import Committed, Frames
from xllm.wire.stream import connect_tcp

SECRET = "open-sesame-open-sesame"


class Instance:
    """The process, and what it has printed so far."""

    def __init__(self, key_file: Path, grace_s: float) -> None:
        command = [sys.executable, "-m", "xllm.testing.instance_process", "--grace-s", str(grace_s)]
        command += ["--cluster-key-file", str(key_file)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith(LISTENING):
                self.address = parse_address(line.removeprefix(LISTENING).strip(), "listening")
                break
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.identity = Identity.of(ClusterConfig(cluster_key_file=str(key_file)), FRONT)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    async def join(self) -> FrontEnd:
        stream, _ = await connect_tcp(*self.address, self.identity)
        return FrontEnd(stream, await attach(stream))

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10.0)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[float], Instance]]:
    key_file = tmp_path / "key"
    key_file.write_text(SECRET)
    key_file.chmod(0o600)
    started: list[Instance] = []

    def make(grace_s: float = 30.0) -> Instance:
        started.append(Instance(key_file, grace_s))
        return started[-1]

    yield make
    for instance in started:
        instance.end()


async def stuck(instance: Instance, request_id: str) -> FrontEnd:
    """A front with a request that runs until its front commits what it has got."""
    front = await instance.join()
    await front.submit(spec(request_id, (1, 2, 3), max_tokens=40, ignore_eos=True))
    while sum(len(f.tokens) for f in front.frames) < 16:
        await front.next_frames(commit=False)
    return front


async def test_sigterm_drains_and_sighup_does_nothing(start: Callable[..., Instance]) -> None:
    instance = start()
    front = await stuck(instance, "old")
    instance.process.send_signal(signal.SIGHUP)
    instance.process.send_signal(signal.SIGTERM)
    while not front.draining:
        await front.next()
    late = await instance.join()  # a front that does not know yet is told by its first request
    await late.submit(spec("new", (1,), max_tokens=1))
    await late.until_last("new")
    error = late.last("new").error
    assert error is not None
    assert error.code == "draining"
    from_now_on = sum(len(f.tokens) for f in front.frames)
    await front.stream.send(Committed(counts=(("old", 0, from_now_on),)))
    await front.until_last("old")
    assert front.last("old").finish_reason is FinishReason.LENGTH
    assert len(front.tokens("old")) == 40
    for end in (front, late):
        await end.until_closed()
    assert instance.process.wait(20.0) == 0


async def test_a_second_sigterm_stops_at_once(start: Callable[..., Instance]) -> None:
    instance = start()
    front = await stuck(instance, "r")
    instance.process.send_signal(signal.SIGTERM)
    while not front.draining:
        await front.next()
    instance.process.send_signal(signal.SIGTERM)
    rest = await front.until_closed()
    assert not any(f.last for m in rest if isinstance(m, Frames) for f in m.frames)
    assert instance.process.wait(20.0) == 0


async def test_the_grace_ends_a_drain(start: Callable[..., Instance]) -> None:
    instance = start(0.0)
    front = await stuck(instance, "r")
    instance.process.send_signal(signal.SIGTERM)
    await front.until_closed()
    assert instance.process.wait(20.0) == 0


async def test_sigquit_ends_it_as_the_system_would(start: Callable[..., Instance]) -> None:
    instance = start()
    instance.process.send_signal(signal.SIGQUIT)
    assert instance.process.wait(20.0) == -signal.SIGQUIT


async def test_the_key_is_in_no_argument_environment_or_log(start: Callable[..., Instance]) -> None:
    instance = start()
    stranger = Identity(role=FRONT)
    with pytest.raises(Exception, match="key") as refused:
        await connect_tcp(*instance.address, stranger)
    process = psutil.Process(instance.process.pid)
    shown = " ".join([*process.cmdline(), *process.environ().values(), str(refused.value)])
    front = await instance.join()
    await front.stream.close()
    instance.process.send_signal(signal.SIGTERM)
    assert instance.process.wait(20.0) == 0
    instance.end()
    log = "".join(instance.lines)
    assert "cluster_key" in log, "the refusal was not logged: this test shows nothing"
    assert SECRET not in shown + log
