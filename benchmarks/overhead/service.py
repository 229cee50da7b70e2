"""What the service layer adds: the same engine driven over HTTP and directly over the wire, in one run.

Rounds in turn: single requests for the time to the first token, then many at once for throughput. The
direct client lives in this process, speaks the engine's messages and looks at no text. What clients and front
take of the CPU is told per token: clients share the cores with the engine, and count as HTTP's cost.

    python -m benchmarks.overhead.service --model smollm2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import machine
from benchmarks.overhead.__main__ import cpu_ns
from benchmarks.overhead.client import run_streams
from xllm.config import EngineConfig
from xllm.config.load import from_keywords
from xllm.ids import new_request_id
from xllm.service.instances.local import LocalEngine
from xllm.testing.server_process import serve
from xllm.types import RequestSpec, SamplingParams, TokenSegment
from xllm.wire.messages import CREDIT_WINDOW, Committed, Frames, Submit

SETTINGS = {"max_model_len": 1024, "num_pages": 512, "enable_prefix_caching": False}
COMMIT_EVERY = CREDIT_WINDOW // 4


def prompt(index: int, length: int) -> tuple[int, ...]:
    return tuple(1000 + (index * 31 + i * 7) % 20000 for i in range(length))


def spec(index: int, model: str, prompt_len: int, num_tokens: int) -> RequestSpec:
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=1, ignore_eos=True)
    segments = (TokenSegment(prompt(index, prompt_len)),)
    return RequestSpec(request_id=new_request_id(), model=model, segments=segments, params=params)


async def direct(engine: LocalEngine, specs: list[RequestSpec]) -> list[float]:
    """Run all at once; seconds to the first token of each."""
    began_s = time.perf_counter()
    counts = {s.request_id: 0 for s in specs}
    told = dict(counts)
    first_s: dict[str, float] = {}
    for one in specs:
        await engine.stream.send(Submit(spec=one))
    left = len(specs)
    while left:
        message = await engine.stream.receive()
        if message is None:
            raise ConnectionError("the engine is gone")
        if not isinstance(message, Frames):
            continue
        for frame in message.frames:
            if frame.error is not None:
                raise frame.error.to_error()
            counts[frame.request_id] += len(frame.tokens)
            first_s.setdefault(frame.request_id, time.perf_counter() - began_s)
            left -= frame.last
        due = [r for r in counts if counts[r] - told[r] >= COMMIT_EVERY]
        if due:
            told.update((r, counts[r]) for r in due)
            await engine.stream.send(Committed(counts=tuple((r, 0, counts[r]) for r in due)))
    return list(first_s.values())


def http_ttft_s(port: int, model: str, index: int, prompt_len: int, num_tokens: int) -> float:
    """One streamed completion over a fresh connection; seconds to its first event."""
    body = {
        "model": model,
        "prompt": list(prompt(index, prompt_len)),
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as sock:
        began_s = time.perf_counter()
        sock.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        received = b""
        while b"data: " not in received:
            received += _some(sock)
        first_s = time.perf_counter() - began_s
        while b"0\r\n\r\n" not in received[-256:]:
            received += _some(sock)
    return first_s


def _some(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 16)
    if not data:
        raise ConnectionError("the server closed the stream")
    return data


COLUMNS = (
    "ttft_http", "ttft_wire", "rate_http", "rate_wire",
    "cpu_us_front", "cpu_us_http_client", "cpu_us_wire_client",
)  # fmt: skip


async def measure(
    args: argparse.Namespace, port: int, front_pid: int, engine: LocalEngine
) -> dict[str, list[float]]:
    """Rounds in turn, so that both see the same machine."""
    seen: dict[str, list[float]] = {name: [] for name in COLUMNS}
    num_tokens = args.streams * args.tokens
    index = 0
    for number in range(args.rounds + 1):
        http, wire = [], []
        for _ in range(args.singles):
            index += 1
            http.append(await asyncio.to_thread(http_ttft_s, port, "paced", index, 64, 8))
            wire += await direct(engine, [spec(index, engine.card.model_id, 64, 8)])
        began_s, front_ns, own_s = time.perf_counter(), cpu_ns(front_pid), time.process_time()
        await asyncio.to_thread(run_streams, port, args.streams, args.tokens)
        http_rate = num_tokens / (time.perf_counter() - began_s)
        front_us = (cpu_ns(front_pid) - front_ns) / 1000 / num_tokens
        http_client_us = (time.process_time() - own_s) * 1e6 / num_tokens
        began_s, own_s = time.perf_counter(), time.process_time()
        await direct(engine, [spec(i, engine.card.model_id, 16, args.tokens) for i in range(args.streams)])
        wire_rate = num_tokens / (time.perf_counter() - began_s)
        wire_client_us = (time.process_time() - own_s) * 1e6 / num_tokens
        if number:  # the first round warms up
            seen["ttft_http"] += http
            seen["ttft_wire"] += wire
            seen["rate_http"].append(http_rate)
            seen["rate_wire"].append(wire_rate)
            seen["cpu_us_front"].append(front_us)
            seen["cpu_us_http_client"].append(http_client_us)
            seen["cpu_us_wire_client"].append(wire_client_us)
    return seen


async def run(args: argparse.Namespace) -> dict[str, Any]:
    config = from_keywords(EngineConfig, {"model": args.model, **SETTINGS})
    engine = await LocalEngine.launch(config)
    try:
        flags = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in SETTINGS.items()]
        flags = [f.replace("--enable-prefix-caching=false", "--no-enable-prefix-caching") for f in flags]
        with serve(args.model, "--served-model-name", "paced", "--log-level", "warning", *flags) as server:
            seen = await measure(args, server.port, server.pid, engine)
    finally:
        await engine.terminate()
    median = {name: statistics.median(values) for name, values in seen.items()}
    return {
        "machine": machine.describe(),
        "command": shlex.join(["benchmarks.overhead.service", *sys.argv[1:]]),
        "ttft_ms_http": round(median["ttft_http"] * 1000, 2),
        "ttft_ms_wire": round(median["ttft_wire"] * 1000, 2),
        "added_ttft_ms": round((median["ttft_http"] - median["ttft_wire"]) * 1000, 2),
        "tokens_per_s_http": round(median["rate_http"], 1),
        "tokens_per_s_wire": round(median["rate_wire"], 1),
        "lost_throughput_percent": round(100 * (1 - median["rate_http"] / median["rate_wire"]), 2),
        "cpu_us_a_token": {n.removeprefix("cpu_us_"): round(median[n], 1) for n in COLUMNS if n[:3] == "cpu"},
        "rates_http": [round(v, 1) for v in seen["rate_http"]],
        "rates_wire": [round(v, 1) for v in seen["rate_wire"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--singles", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
