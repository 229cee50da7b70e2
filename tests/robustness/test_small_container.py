"""Real control groups with little memory: an engine refuses with the numbers or lives; none is killed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from xllm.testing.server_process import ServerProcess

MIB = 1 << 20
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
FLAGS = ("--platform", "native", "--max-num-seqs", "4", "--max-model-len", "2048")


@contextlib.contextmanager
def container(limit_mib: int) -> Iterator[Path]:
    """A control group two levels deep, the limit on the upper one, as a pod with a container in it has it."""
    root, limit = (V1, "memory.limit_in_bytes") if V1.is_dir() else (V2, "memory.max")
    outer = root / f"xllm-test-{secrets.token_hex(4)}"
    inner = outer / "inner"
    try:
        outer.mkdir()
        (outer / limit).write_text(str(limit_mib * MIB))
        if root is V2:
            (outer / "cgroup.subtree_control").write_text("+memory")
        inner.mkdir()
    except OSError as error:
        with contextlib.suppress(OSError):
            outer.rmdir()
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        yield inner
    finally:
        inner.rmdir()
        outer.rmdir()


def kills(group: Path) -> int:
    for name in ("memory.oom_control", "memory.events"):
        with contextlib.suppress(OSError):
            lines = dict(line.split() for line in (group / name).read_text().splitlines())
            return int(lines.get("oom_kill", 0))
    raise AssertionError("nobody counts kills here")


def start(group: Path, model: str, *flags: str) -> ServerProcess:
    enter = ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    return ServerProcess((model, *FLAGS, *flags), dict(os.environ), within=enter)


@pytest.mark.robustness
@pytest.mark.timeout(600)
@pytest.mark.parametrize("limit_mib", [300, 600, 800])
def test_an_engine_refuses_or_lives(smollm2: str, limit_mib: int) -> None:
    with container(limit_mib) as group:
        server = start(group, smollm2)
        try:
            server.wait_ready()
        except RuntimeError:
            text = "\n".join(server.lines)
            assert "memory: the engine would not fit" in text
            assert "left of the" in text
            assert str(group.parent.name) in text
            assert "Traceback" not in text
            print(text)
        else:
            fill(server)
            print("\n".join(line for line in server.lines if "memory" in line))
        finally:
            server.stop()
        assert kills(group) == 0


@pytest.mark.robustness
@pytest.mark.timeout(600)
def test_what_a_refusal_names_starts_and_lives(smollm2: str) -> None:
    """The same container, with the first remedy that was named, which may be several settings."""
    with container(560) as group:
        server = start(group, smollm2)
        try:
            with pytest.raises(RuntimeError, match="fits with: ") as refused:
                server.wait_ready()
        finally:
            server.stop()
        remedy = str(refused.value).rpartition("fits with: ")[2].split("\n")[0].split(";")[0].split()
        server = start(group, smollm2, *remedy)
        try:
            server.wait_ready()
            fill(server)
        finally:
            server.stop()
        assert kills(group) == 0


def fill(server: ServerProcess) -> None:
    """More tokens than there are pages for, so that every page is touched."""
    pages = sum(v for k, v in server.metrics().items() if k.startswith("xllm:free_pages"))
    longest = httpx.get(f"{server.base_url}/v1/models", timeout=30).json()["data"][0]["max_model_len"]
    length = min(1000, longest - 40)
    num_requests = int(pages * 64 // length) + 4

    def ask(i: int) -> int:
        body = {
            "model": "smollm2",
            "prompt": [(i * 7919 + j) % 49000 for j in range(length)],
            "max_tokens": 8,
        }
        return httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=600).status_code

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert set(threads.map(ask, range(num_requests))) == {200}
    assert server.count("xllm:instance_restarts") == 0
