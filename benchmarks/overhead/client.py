"""A client that costs almost nothing: it counts events and looks at no text."""

from __future__ import annotations

import json
import selectors
import socket
from dataclasses import dataclass

END = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Stream:
    """One connection; `num_events` without the end marker."""

    sock: socket.socket
    num_events: int = 0
    tail: bytes = b""


def run_streams(port: int, num_streams: int, num_tokens: int, *, chat: bool = False) -> int:
    """Stream `num_streams` answers of `num_tokens` at once; the number of events received."""
    streams = [_open(port, i, num_tokens, chat) for i in range(num_streams)]
    total = 0
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.sock, selectors.EVENT_READ, stream)
        alive = num_streams
        while alive:
            for key, _ in selector.select():
                if _read(key.data):
                    selector.unregister(key.data.sock)
                    key.data.sock.close()
                    total += key.data.num_events
                    alive -= 1
    return total


def _open(port: int, index: int, num_tokens: int, chat: bool) -> Stream:
    body: dict[str, object] = {"model": "paced", "max_tokens": num_tokens, "stream": True, "temperature": 0.0}
    body["ignore_eos"] = True
    if chat:
        body["messages"] = [{"role": "user", "content": f"number {index}"}]
    else:
        body["prompt"] = [100 + (index + i) % 64 for i in range(16)]
    data = json.dumps(body).encode()
    path = "chat/completions" if chat else "completions"
    head = f"POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return Stream(sock)


def _read(stream: Stream) -> bool:
    """Take in what is there; True at the end."""
    data = stream.sock.recv(1 << 16)
    if not data:
        raise ConnectionError(f"a stream ended early: {stream.tail!r}")
    stream.num_events += data.count(b"data: ")
    stream.tail = (stream.tail + data)[-256:]
    if b"0\r\n\r\n" not in stream.tail:
        return False
    if END not in stream.tail:
        raise ConnectionError(f"a stream failed: {stream.tail!r}")
    stream.num_events -= 1
    return True
