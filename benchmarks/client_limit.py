"""How many streamed chunks a second the load generator of `xllm bench serve` can take in.

A server thread answers with prepared bytes as fast as the socket allows, so that what is measured is
the generator plus the cheapest server there can be. Below that rate a result speaks about the server.

    make bench-client
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket

from xllm.cli.bench.datasets import Ask
from xllm.cli.bench.generator import Target, run_load
from xllm.cli.bench.metrics import summarise
from xllm.cli.http_client import Server
from xllm.clock import SystemClock

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def answer(num_tokens: int) -> list[bytes]:
    """The stream of one request: a chunk a token, as a real server sends it."""
    token = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "m"}
    token |= {"choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": num_tokens}}
    texts = [json.dumps(token)] * num_tokens + [json.dumps(usage), "[DONE]"]
    events = [f"data: {text}\n\n".encode() for text in texts]
    return [HEAD, *(f"{len(event):x}\r\n".encode() + event + b"\r\n" for event in events), b"0\r\n\r\n"]


def serve(listener: socket.socket, num_tokens: int) -> None:
    """Runs in a process of its own, so that it does not share the generator's interpreter lock."""
    parts = answer(num_tokens)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        for part in parts:
            writer.write(part)
            # One system call a token, as when tokens come one by one.
            await asyncio.sleep(0)
        await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handler, sock=listener, backlog=512)
        async with server:
            await server.serve_forever()

    asyncio.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    process = multiprocessing.get_context("fork").Process(
        target=serve, args=(listener, args.num_tokens), daemon=True
    )
    process.start()
    target = Target(server=Server.parse(f"http://127.0.0.1:{port}"), model="m")
    asks = [Ask(prompt="x", output_len=args.num_tokens)] * args.num_requests
    outcomes = asyncio.run(
        run_load(target, asks, [0.0] * len(asks), SystemClock(), max_concurrency=args.concurrency)
    )
    process.kill()
    summary = summarise(outcomes, {})
    print(
        f"{summary['completed']} requests, {summary['failed']} failed; "
        f"{summary['output_throughput']:.0f} chunks/s in {summary['duration']:.2f} s"
    )


if __name__ == "__main__":
    main()
