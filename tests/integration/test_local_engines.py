"""Several engine processes behind one front: killed, stopped, replaced and drained under running streams.

Tokens of the null platform are hashes of what was computed before, so a wrong resume shows in every token
after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faultlab.lab import environment
from xllm.artifacts.write import write_hf_dir
from xllm.engine.kernels.native.library import find
from xllm.testing.server_process import ServerProcess, serve
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
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
LENGTH = 1200
PROMPTS = [f"stream {i}: " + "all work and no play " * (3 * i) for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_hf_dir(directory, CONFIG, {}, tiny_assets(512))
    return directory


@contextlib.contextmanager
def null_server(model: Path, instances: str, *more: str, pace_ms: float = 0.0) -> Iterator[ServerProcess]:
    """`pace_ms`: what each draw takes at least."""
    args = ("--platform", "null", "--served-model-name", "tiny", "--instances", instances)
    if pace_ms:
        args += ("--logits-processors", "faultlab")
    with serve(str(model), *args, *more, env=environment(pace_ms)) as server:
        for i in range(int(instances.split(":")[1])):
            server.wait_line(f"engine-{i} takes requests")
        yield server


Said = tuple[str, str, int]
"""(text, finish reason, completion tokens)."""


def stream_once(server: ServerProcess, body: dict[str, Any], began: threading.Event) -> Said:
    """One streamed completion; `began` is set with its first event, or its failure."""
    text, reason, num_tokens = "", "", 0
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        with httpx.stream("POST", f"{server.base_url}/v1/completions", json=asked, timeout=120) as reply:
            assert reply.status_code == 200, reply.read()
            for line in lines_of(reply.iter_text()):
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[len("data: ") :])
                assert "error" not in event, event
                for choice in event["choices"]:
                    text += choice["text"]
                    reason = choice["finish_reason"] or reason
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                began.set()
    finally:
        began.set()
    return text, reason, num_tokens


def lines_of(texts: Iterator[str]) -> Iterator[str]:
    """As `iter_lines`, which also takes U+0085 or U+2028 inside an event for the end of a line."""
    rest = ""
    for text in texts:
        *whole, rest = (rest + text).split("\n")
        yield from whole


class Stream:
    """One streamed completion on a thread of its own."""

    def __init__(self, server: ServerProcess, body: dict[str, Any], pool: ThreadPoolExecutor) -> None:
        self.began = threading.Event()
        self._done: Future[Said] = pool.submit(stream_once, server, body, self.began)

    def result(self) -> Said:
        return self._done.result(120)


def body(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": LENGTH, "ignore_eos": True} | more


def bodies() -> list[dict[str, Any]]:
    return [body(p, temperature=0.8 * (i % 2), seed=i) for i, p in enumerate(PROMPTS)]


def under(server: ServerProcess, fault: Callable[[], None]) -> list[Said]:
    """All streams at once, with the fault when every one of them has begun."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        streams = [Stream(server, each, pool) for each in bodies()]
        for stream in streams:
            assert stream.began.wait(60)
        fault()
        return [stream.result() for stream in streams]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Said]:
    """What an undisturbed engine says."""
    with null_server(model, "mixed:1") as server:
        undisturbed = under(server, lambda: None)
    assert [(reason, count) for _, reason, count in undisturbed] == [("length", LENGTH)] * len(PROMPTS)
    assert len({text for text, _, _ in undisturbed}) == len(PROMPTS)
    return undisturbed


def test_a_killed_engines_streams_go_on_and_it_comes_back_under_its_name(
    model: Path, expected: list[Said]
) -> None:
    with null_server(model, "mixed:2") as server:
        first, second = server.engine_pids()
        told = len(server.lines)
        assert under(server, lambda: os.kill(first, signal.SIGKILL)) == expected
        assert "with 0 requests" not in server.wait_line("instance engine-0 is lost", since=told)
        server.wait_line(f"engine-0 (process {first}) ended with code -9", since=told)
        server.wait_line("engine-0 takes requests", since=told)
        pids = server.engine_pids()
        assert second in pids
        assert first not in pids
        assert len(pids) == 2
        assert under(server, lambda: None) == expected


def test_all_engines_killed_at_once_come_back_and_the_streams_go_on(
    model: Path, expected: list[Said]
) -> None:
    with null_server(model, "mixed:2") as server:
        killed = server.engine_pids()

        def kill_all() -> None:
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

        told = len(server.lines)
        assert under(server, kill_all) == expected
        for name in ("engine-0", "engine-1"):
            server.wait_line(f"{name} takes requests", since=told)
        assert not set(server.engine_pids()) & set(killed)


def restarted_under_load(server: ServerProcess, expected: list[Said]) -> list[str]:
    """What was printed during a rolling restart. Until one is moved, stream follows stream at once."""
    told = len(server.lines)
    done = threading.Event()

    def keep_streaming(number: int, began: threading.Event) -> None:
        while not done.is_set() and not has_moved(server.lines[told:]):
            assert stream_once(server, bodies()[number], began) == expected[number]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        began = [threading.Event() for _ in PROMPTS]
        streaming = [pool.submit(keep_streaming, i, event) for i, event in enumerate(began)]
        try:
            assert all(event.wait(60) for event in began)
            server.process.send_signal(signal.SIGHUP)
            server.wait_line("all engines are restarted", since=told)
        finally:
            done.set()
        for stream in streaming:
            stream.result(120)
    return server.lines[told:]


def has_moved(lines: list[str]) -> bool:
    """Taken off at the end of the time, or handed over while it ran."""
    drained = [line for line in lines if " cause=drain " in line or " reason=drain " in line]
    return any(" cause=drain " in line or " outcome=done " in line for line in drained)


@pytest.mark.parametrize("instances", ["mixed:1", "mixed:2"])
def test_a_rolling_restart_costs_no_request(model: Path, expected: list[Said], instances: str) -> None:
    # Streams take longer than they are given to end by themselves, so that they are moved. Should all of
    # them end just then, the engines are restarted once more.
    with null_server(model, instances, "--shutdown-timeout-s", "0.1") as server:
        for _ in range(5):
            before = server.engine_pids()
            lines = restarted_under_load(server, expected)
            after = server.engine_pids()
            assert len(after) == len(before)
            assert not set(after) & set(before)
            if has_moved(lines):
                return
    pytest.fail("no running request was moved")


def test_a_stopped_engine_is_left_killed_and_replaced(
    model: Path, expected: list[Said], tmp_path: Path
) -> None:
    quick = tmp_path / "quick.toml"
    quick.write_text("suspect_floor_s = 0.7\nhang_kill_s = 0.5\n")
    with null_server(model, "mixed:2", "--config", str(quick)) as server:
        stopped, _ = server.engine_pids()
        told = len(server.lines)
        assert under(server, lambda: os.kill(stopped, signal.SIGSTOP)) == expected
        server.wait_line("instance engine-0 is suspected", since=told)
        server.wait_line(f"engine {stopped} makes no progress and is killed", since=told)
        server.wait_line("engine-0 takes requests", since=told)
        assert stopped not in server.engine_pids()


def test_a_second_signal_stops_at_once_and_leaves_no_engine(model: Path) -> None:
    # Paced: it cannot end before the second signal.
    with null_server(model, "mixed:2", pace_ms=20) as server, ThreadPoolExecutor(1) as pool:
        engines = server.engine_pids()
        endless = Stream(server, body("endless", max_tokens=4000), pool)
        assert endless.began.wait(60)
        server.process.send_signal(signal.SIGTERM)
        server.wait_line("draining")
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 130
        with pytest.raises((httpx.HTTPError, AssertionError)):
            endless.result()
        for pid in engines:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_the_first_signal_lets_streams_end_and_a_restart_under_way_is_given_up(model: Path) -> None:
    with null_server(model, "mixed:2") as server, ThreadPoolExecutor(1) as pool:
        stream = Stream(server, body("to the end", max_tokens=500), pool)
        assert stream.began.wait(60)
        server.process.send_signal(signal.SIGHUP)
        server.wait_line("restarting the engines")
        server.process.send_signal(signal.SIGTERM)
        assert stream.result()[1:] == ("length", 500)
        assert server.process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
def test_engines_die_with_their_front_whatever_it_dies_of(model: Path, number: signal.Signals) -> None:
    with null_server(model, "mixed:2") as server:
        engines = server.engine_pids()
        fds = [os.pidfd_open(pid) for pid in engines]
        resource.prlimit(server.pid, resource.RLIMIT_CORE, (0, 0))
        server.process.send_signal(number)
        assert server.process.wait(30) == -number
        for fd in fds:
            # Readable once the process has ended.
            assert select.select([fd], [], [], 30.0)[0]
            os.close(fd)


def test_a_killed_engine_of_a_real_model_goes_on_with_its_pages_to_the_same_bits(smollm2: str) -> None:
    path, why = find()
    if path is None:
        pytest.skip(f"no native kernels: {why}")
    prompt = "It was the best of times, it was the worst of times. " * 20
    asked = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    args = ("--max-model-len", "1024", "--num-pages", "64", "--served-model-name", "m")
    with serve(smollm2, *args) as server:

        def ask() -> dict[str, Any]:
            url = f"{server.base_url}/v1/completions"
            reply = httpx.post(url, json=asked | {"model": "m"}, timeout=120)
            assert reply.status_code == 200, reply.text
            answer: dict[str, Any] = reply.json()
            return answer

        first = ask()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        (killed,) = server.engine_pids()
        told = len(server.lines)
        os.kill(killed, signal.SIGKILL)
        server.wait_line(f"engine-0 (process {killed}) ended with code -9", since=told)
        line = server.wait_line("surviving pages", since=told)
        num_full = (first["usage"]["total_tokens"] - 1) // 64
        assert f"{num_full} taken over, 0 refused" in line
        second = ask()
        num_cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert num_cached == (second["usage"]["prompt_tokens"] - 1) // 64 * 64
        assert second["choices"] == first["choices"]
