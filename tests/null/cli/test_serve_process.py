"""`xllm serve` as a process on the null platform: starts, tells, serves, drains, and refuses in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from xllm.artifacts.write import write_hf_dir
from xllm.cli.main import main
from xllm.testing.server_process import ServerProcess
from xllm.testing.tiny_tokenizer import tiny_assets

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights: the null platform needs its shape and its tokenizer only."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_hf_dir(directory, CONFIG, {}, tiny_assets(512))
    return directory


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    cpu = str(max(os.sched_getaffinity(0)))
    process = ServerProcess([str(model), "--platform", "null", "--served-model-name", "tiny", "--cpus", cpu])
    try:
        process.wait_ready(60)
        yield process
    finally:
        process.stop()


def test_start_up_tells_where_time_went_and_why(server: ServerProcess) -> None:
    told = "\n".join(server.lines)
    assert "platform = 'null' (command line)" in told
    assert "platform=null: as asked" in told
    assert "max_model_len=1024: the model's own limit" in told
    assert " s  HTTP" in told
    assert "try: curl http://127.0.0.1:" in told


def test_every_thread_of_the_engine_is_bound_to_the_cpus_asked_for_and_the_front_is_not(
    server: ServerProcess,
) -> None:
    task = Path(f"/proc/{server.pid}/task/{server.pid}")
    (engine,) = (task / "children").read_text().split()
    threads = [int(t.name) for t in Path(f"/proc/{engine}/task").iterdir()]
    allowed = os.sched_getaffinity(0)
    assert len(threads) > 1
    assert {frozenset(os.sched_getaffinity(t)) for t in threads} == {frozenset([max(allowed)])}
    assert os.sched_getaffinity(server.pid) == allowed


def test_the_printed_server_answers(server: ServerProcess) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    reply = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=30)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] <= 5


def test_the_benchmark_measures_it(server: ServerProcess, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    words = ["bench", "serve", "--base-url", server.base_url, "--num-prompts", "8", "--input-len", "5"]
    assert main([*words, "--output-len", "6", "--request-rate", "100", "--json", str(result)]) == 0
    data = json.loads(result.read_text())
    assert data["completed"] == 8
    assert data["output_lens"] == [6] * 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(model: Path, number: signal.Signals) -> None:
    process = ServerProcess([str(model), "--platform", "null"])
    try:
        process.wait_ready(60)
        process.process.send_signal(number)
        assert process.process.wait(60) == 0
    finally:
        process.stop()


def refused(*words: str) -> str:
    """What `xllm serve` says when it cannot start; checks the exit status and that it is short."""
    done = subprocess.run(
        [sys.executable, "-m", "xllm.cli.main", "serve", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_taken_port_is_named(server: ServerProcess, model: Path) -> None:
    line = refused(str(model), "--platform", "null", "--port", str(server.port))
    assert str(server.port) in line
    assert "--port" in line


def test_what_the_engine_refuses_is_told_by_the_command(model: Path) -> None:
    line = refused(str(model), "--platform", "null", "--max-model-len", "4096", "--port", "0")
    assert "max_model_len=4096" in line
    assert "1024" in line


def test_an_unknown_platform_is_refused_with_the_known_ones(model: Path) -> None:
    line = refused(str(model), "--platform", "abacus", "--port", "0")
    assert "abacus" in line
    assert "cpu" in line
