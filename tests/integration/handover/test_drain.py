"""An instance that is told to go hands its running requests over with their pages (F53): null device."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from benchmarks.faults.run import golden
from benchmarks.faults.streams import bodies
from tests.faultlab.cluster import wait_connected, wait_for
from tests.faultlab.handover import ROW_MS, Struck, answer_of, handover_lab, uncached
from tests.faultlab.lab import MODEL, environment, flags
from xllm.testing.server_process import ServerProcess

BODIES = bodies(MODEL, 8, 11, max_tokens=300)


def taken(service: ServerProcess) -> int:
    data = httpx.get(f"{service.base_url}/instances", timeout=30, trust_env=False).json()
    return sum(i["moves"]["in"] for i in data["instances"])


@pytest.mark.robustness
def test_running_requests_leave_a_drained_instance_with_their_pages(tmp_path: Path) -> None:
    args = (*flags(tmp_path), "--logits-processors", "handoverlab")
    with handover_lab(tmp_path, *args, instances="mixed:1") as alone:
        wanted = asyncio.run(golden(alone.server.base_url, BODIES))
    # Short enough that the drain does not wait for the streams to end by themselves.
    env = environment(5.0, max_queue_delay_s=0, shutdown_timeout_s=4, router_policy="round-robin")
    env |= {"HANDOVERLAB_ROW_MS": str(ROW_MS)}
    running = [ServerProcess(args, env, command="instance") for _ in range(2)]
    try:
        for process in running:
            process.wait_ready(60)
        where = ",".join(process.base_url for process in running)
        service = ServerProcess(("--registry", f"static://{where}"), env, command="service")
        running.append(service)
        service.wait_ready(60)
        wait_connected(service, 2)

        async def drained() -> Struck:
            async with httpx.AsyncClient(base_url=service.base_url, timeout=120, trust_env=False) as http:
                asked = [asyncio.create_task(answer_of(http, body)) for body in uncached(BODIES)]
                await asyncio.sleep(0.5)  # into the middle of the answers; nothing is judged by it
                assert not all(task.done() for task in asked), "no request was running"
                running[0].process.send_signal(signal.SIGTERM)
                return Struck(pid=0, answers=list(await asyncio.gather(*asked)))

        struck = asyncio.run(drained())
        assert struck.differences(wanted) == []
        assert taken(service) > 0, "nothing moved with its pages"
        wait_for(lambda: running[0].process.poll() is not None, "the drained instance ends")
        assert running[0].process.returncode == 0
    finally:
        for process in running:
            process.process.kill()
            process.stop()
