"""A client that leaves stops costing: its pages are free within 2 s of the socket's close."""

from __future__ import annotations

import json
import socket
import time

import pytest

from xllm.testing.server_process import ServerProcess

LIMIT_S = 2.0


def open_request(server: ServerProcess, *, stream: bool) -> socket.socket:
    body = json.dumps(
        {"model": "smollm2", "prompt": "Once", "max_tokens": 1800, "ignore_eos": True, "stream": stream}
    ).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    sock.sendall(head.encode() + body)
    return sock


def owned_pages(server: ServerProcess) -> float:
    return server.metric("xllm:owned_pages")


def wait_for(condition, limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_closing_the_socket_frees_the_pages(server: ServerProcess, stream: bool) -> None:
    assert wait_for(lambda: owned_pages(server) == 0, 30)
    sock = open_request(server, stream=stream)
    if stream:
        assert b"200" in sock.recv(4096)
    assert wait_for(lambda: owned_pages(server) > 0, 30)
    sock.close()
    assert wait_for(lambda: owned_pages(server) == 0, LIMIT_S)
    assert server.metric("vllm:num_requests_running") == 0
