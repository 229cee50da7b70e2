"""Python time of the front for a streamed token, from a decoded frame to the call that writes to the socket.

One thread, no sockets, no system calls but the loop's own; the best of many steps, so that company on the
machine hardly matters:

    python -m benchmarks.overhead.front
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

from msgspec import structs

from xllm.api.app import create_app
from xllm.api.http.connection import Connection
from xllm.api.http.limits import HttpLimits
from xllm.api.metrics import Metrics
from xllm.clock import SystemClock
from xllm.config import FrontConfig, ServerConfig
from xllm.service.front import Front
from xllm.service.watch.desk import WatchDesk
from xllm.testing.fake_engine import SampleEngine, sample_card
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.types import EngineSnapshot
from xllm.wire.codec import HEADER, decode_engine, encode
from xllm.wire.messages import Frame, Frames


class CountingTransport(asyncio.Transport):
    """Takes every write and keeps none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_writes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.num_writes == 0 and not bytes(data).startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"a stream was refused: {bytes(data)!r}")
        self.num_writes += 1

    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        return

    def abort(self) -> None:
        return

    def close(self) -> None:
        return


class Keeper:
    """No cap and no drain."""

    draining = False

    def admit(self, connection: Connection) -> bool:
        return True

    def mark(self, connection: Connection, *, busy: bool) -> None:
        return

    def forget(self, connection: Connection) -> None:
        return


def post(path: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


async def measure(num_streams: int, num_steps: int, *, chat: bool) -> float:
    """Best microseconds a token."""
    assets = tiny_assets(512)
    card = structs.replace(sample_card(assets, max_model_len=4096), num_pages=100 * num_streams)
    engine = SampleEngine(card, assets, auto=False)
    metrics = Metrics()
    desk = WatchDesk(SystemClock(), metrics)
    # No prediction may refuse: nothing is computed here, so there is no rate to predict from.
    config = FrontConfig(max_queue_delay_s=0)
    front = Front(config, None, SystemClock(), observer=desk.observer)
    instance = await front.add_instance(engine.stream, engine.card, name="engine-0")
    app = create_app(front, ServerConfig(), clock=SystemClock(), metrics=metrics)
    limits = HttpLimits.from_config(ServerConfig())
    body: dict[str, object] = {"model": "sample", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": [100, 101, 102]}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    transports = [CountingTransport() for _ in range(num_streams)]
    connections = [Connection(app, limits, Keeper()) for _ in transports]
    for connection, transport in zip(connections, transports, strict=True):
        connection.connection_made(transport)
        connection.data_received(post(path, body))
    while len(engine.request_ids) < num_streams:
        await asyncio.sleep(0.001)
    best = float("inf")
    for step in range(num_steps):
        data = step_of(engine, step)
        before = sum(t.num_writes for t in transports)
        start = time.perf_counter()
        instance._dispatch(decode_engine(data))
        while sum(t.num_writes for t in transports) < before + num_streams:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        best = min(best, time.perf_counter() - start) if step > 5 else best
    for connection in connections:
        connection.connection_lost(None)
    await front.close()
    await engine.close()
    return best / num_streams * 1e6


def step_of(engine: SampleEngine, step: int) -> bytes:
    """A step's message as it comes from an engine."""
    frames = tuple(
        Frame(request_id=rid, offset=step, tokens=(100 + (step * 7 + i) % 64,), queue_ms=1.5)
        for i, rid in enumerate(engine.request_ids)
    )
    return encode(Frames(frames=frames, snapshot=EngineSnapshot(step=step)))[HEADER.size :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    for chat in (False, True):
        for num in (1, 8, 64):
            us = asyncio.run(measure(num, args.steps, chat=chat))
            name = "chat completions" if chat else "completions"
            print(f"{name:16s} {num:3d} streams: {us:6.1f} us a token", flush=True)


if __name__ == "__main__":
    main()
