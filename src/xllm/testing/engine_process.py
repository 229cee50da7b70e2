"""A `SampleEngine` as a process: `python -m xllm.testing.engine_process --fd N`.

For tests of what starts and ends engine processes; light enough to start in a fraction of a second.
The model argument of Start decides its behaviour: "fail" refuses to load, "die" exits at once,
"hang" never answers, anything else serves the echo script under that name.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys

from xllm.errors import ErrorInfo
from xllm.testing.fake_engine import SampleEngine, sample_card
from xllm.testing.memory_stream import MemoryEngineStream
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.wire.codec import HEADER, body_length, decode_front, encode
from xllm.wire.messages import FrontMessage, Hello, Progress, Start, StartFailed

DIED = 7
"""Exit code of the model "die"."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--log-level")
    parser.add_argument("--pages-fd")
    fd = parser.parse_args().fd
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return asyncio.run(_serve(socket.socket(fileno=fd)))


async def _serve(sock: socket.socket) -> int:
    reader, writer = await asyncio.open_connection(sock=sock)
    hello, start = await _receive(reader), await _receive(reader)
    if not isinstance(hello, Hello) or not isinstance(start, Start):
        return 1
    model = start.config.model.model
    if model == "die":
        return DIED
    if model == "hang":
        await reader.read()
        return 0
    writer.write(encode(Progress(stage="nothing to load", elapsed_s=0.0)))
    if model == "fail":
        error = ErrorInfo(kind="ConfigError", code="invalid_config", message="model='fail' fails")
        writer.write(encode(StartFailed(error=error)))
        await writer.drain()
        return 1
    assets = tiny_assets(512)
    engine = SampleEngine(sample_card(assets, model_id=model), assets)
    await engine.stream.send(hello)
    await engine.stream.send(start)
    answers = asyncio.create_task(_answer(engine.stream, writer))
    while (message := await _receive(reader)) is not None:
        await engine.stream.send(message)
    answers.cancel()
    return 0


async def _answer(stream: MemoryEngineStream, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while (message := await stream.receive()) is not None:
            writer.write(encode(message))
            await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> FrontMessage | None:
    try:
        header = await reader.readexactly(HEADER.size)
        return decode_front(await reader.readexactly(body_length(header)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


if __name__ == "__main__":
    sys.exit(main())
