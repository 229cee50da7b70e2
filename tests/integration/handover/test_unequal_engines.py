"""Engines that a front found, not started: other thread counts, and others that must not be paired (F57)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults.run import golden
from benchmarks.faults.streams import bodies
from tests.faultlab.cluster import wait_connected
from tests.faultlab.handover import first_difference, handover_lab
from tests.faultlab.lab import CONFIG, MODEL, environment, flags
from xllm.artifacts.write import write_hf_dir
from xllm.testing.server_process import ServerProcess
from xllm.testing.tiny_tokenizer import tiny_assets


@contextlib.contextmanager
def found(*instances: tuple[str, tuple[str, ...]], transfer: str = "auto") -> Iterator[ServerProcess]:
    """A service over `xllm instance` processes, each (its role, its arguments)."""
    running: list[ServerProcess] = []
    try:
        for role, args in instances:
            env = environment(role=role, transfer=transfer)
            running.append(ServerProcess(args, env, command="instance"))
        for process in running:
            process.wait_ready(120)
        where = ",".join(process.base_url for process in running)
        env = environment(max_queue_delay_s=0)
        service = ServerProcess(("--registry", f"static://{where}"), env, command="service")
        running.append(service)
        service.wait_ready(60)
        wait_connected(service, len(instances))
        yield service
    finally:
        for process in running:
            process.process.kill()
            process.stop()


@pytest.mark.robustness
def test_thread_counts_change_no_answer(smollm2: str, tmp_path: Path) -> None:
    asked = bodies("smollm2", 6, 7, max_tokens=40)
    args = (smollm2, "--max-model-len", "1024", "--num-pages", "200", "--num-threads")
    with handover_lab(tmp_path, *args, "1", instances="mixed:1") as alone:
        wanted = asyncio.run(golden(alone.server.base_url, asked))
    with found(("prefill", (*args, "1")), ("decode", (*args, "2")), transfer="tcp") as service:
        got = asyncio.run(golden(service.base_url, asked))
        assert service.count("xllm:kv_transfer_bytes_total") > 0, "nothing was handed over"
    different = [
        first_difference(a, b) for a, b in zip(wanted, got, strict=True) if a.content() != b.content()
    ]
    assert different == []


def test_engines_of_another_layout_are_never_paired(tmp_path: Path) -> None:
    """The same name, another file: its pages would be garbage. Requests are answered, not handed over."""
    other = tmp_path / "other"
    write_hf_dir(
        other, CONFIG | {"num_hidden_layers": 3}, {"unused": np.zeros((1,), np.float32)}, tiny_assets(512)
    )
    ours = flags(tmp_path)
    asked = bodies(MODEL, 8, 9, max_tokens=40)
    with handover_lab(tmp_path, *ours, instances="mixed:1") as alone:
        wanted = asyncio.run(golden(alone.server.base_url, asked))
    with found(("prefill", ours), ("decode", (str(other), *ours[1:]))) as service:
        got = asyncio.run(golden(service.base_url, asked))
        assert service.count("xllm:kv_transfer_bytes_total") == 0
    assert [a.content() for a in got] == [a.content() for a in wanted]
