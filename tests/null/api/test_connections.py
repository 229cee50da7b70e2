"""Connections: reuse, order, the cap, readers that stop reading, and the drain."""

from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

from tests.null.api.conftest import MakeSite, Site, events
from tests.null.api.test_streams import BODY, post, submitted
from xllm.api.http import HttpLimits, Reply, Request, serve_connections
from xllm.api.http.outbox import Outbox
from xllm.testing.hostile_http import parse_responses

GET = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def read_response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head.split(b" ")[1]), await reader.readexactly(length)


async def test_a_hundred_pipelined_requests_are_answered_in_order(site: Site) -> None:
    ask = b"".join(
        b"GET /v1/models/m%d HTTP/1.1\r\nHost: a.b\r\nX-Request-Id: id-%d\r\n\r\n" % (i, i)
        for i in range(100)
    )
    reader, _ = await site.raw(ask.replace(b"a.b", b"localhost"))
    for i in range(100):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"x-request-id: id-%d\r\n" % i in head
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))


async def test_a_request_behind_a_stream_waits_for_its_end(site: Site) -> None:
    reader, _ = await site.raw(post("/v1/completions", {**BODY, "stream": True}) + GET)
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    stream = await reader.readuntil(b"\r\n0\r\n\r\n")
    assert b"data: [DONE]" in stream
    assert await read_response(reader) == (200, b'{"status":"ok"}')


async def test_more_pipelined_input_than_allowed_ends_the_connection_after_the_answer(
    make_site: MakeSite,
) -> None:
    site = await make_site(engine={"auto": False})
    reader, writer = await site.raw(post("/v1/completions", BODY))
    await submitted(site.engine)
    writer.write(GET * 5000)
    await writer.drain()
    while site.engine.request_ids:
        site.engine.step()
    statuses, _ = parse_responses(await reader.read())
    assert statuses[0] == 200
    assert len(statuses) < 5000


async def test_http_1_0_gets_an_unframed_stream_and_the_end(site: Site) -> None:
    reader, _ = await site.raw(post("/v1/completions", {**BODY, "stream": True}, version="1.0"))
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert b"transfer-encoding" not in head.lower()
    assert events(body.decode())[-1] == "[DONE]"


async def test_silent_connections_make_room_for_a_client_that_speaks(make_site: MakeSite) -> None:
    site = await make_site(max_connections=4)
    silent = [await site.raw(b"") for _ in range(4)]
    assert (await site.client.get("/live")).status_code == 200
    assert await silent[0][0].read() == b""  # the one that waited longest


async def test_half_a_head_that_makes_room_is_told_so(make_site: MakeSite) -> None:
    site = await make_site(max_connections=1)
    reader, _ = await site.raw(b"GET /live HT")
    assert (await site.client.get("/live")).status_code == 200
    assert parse_responses(await reader.read()) == ((503,), True)


async def test_when_every_connection_is_busy_a_new_one_is_turned_away(make_site: MakeSite) -> None:
    site = await make_site(engine={"auto": False}, max_connections=2)
    for count in (1, 2):
        await site.raw(post("/v1/completions", BODY))
        await submitted(site.engine, count)
    reader, _ = await site.raw(b"")
    status, body = await read_response(reader)
    assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")


async def test_draining_lets_streams_end_and_takes_nothing_new(make_site: MakeSite) -> None:
    site = await make_site(engine={"auto": False})
    idle, _ = await site.raw(GET)
    await read_response(idle)
    reader, _ = await site.raw(post("/v1/completions", {**BODY, "stream": True}))
    await submitted(site.engine)
    draining = asyncio.create_task(site.server.drain(site.front, 10.0))
    assert await idle.read() == b""
    while site.engine.request_ids:
        site.engine.step()
    body = await reader.read()
    assert b"data: [DONE]" in body
    assert await draining
    try:
        await asyncio.open_connection("127.0.0.1", site.port)
    except (OSError, IndexError):
        refused = True
    else:
        refused = False
    assert refused


async def test_draining_cuts_off_what_does_not_end(make_site: MakeSite) -> None:
    site = await make_site(engine={"auto": False})
    asked = asyncio.create_task(site.client.post("/v1/completions", json=BODY))
    await submitted(site.engine)
    assert not await site.server.drain(site.front, 0.01)
    response = await asked
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")


async def test_a_reader_that_stops_holds_a_bounded_buffer_and_is_dropped() -> None:
    written = 0
    gone = asyncio.Event()

    async def handler(_: Request, reply: Reply) -> None:
        nonlocal written
        reply.start(200, "text/plain")
        try:
            while True:
                await reply.write(b"x" * 65536)
                written += 65536
        finally:
            gone.set()

    limits = HttpLimits(write_timeout_s=0.05, write_buffer_bytes=65536)
    listener = await serve_connections(handler, "127.0.0.1", 0, limits)
    _, writer = await asyncio.open_connection("127.0.0.1", listener.port, limit=1024)
    writer.write(GET)
    await gone.wait()
    # Ours is 64 KiB and one piece; the rest are the kernel's socket buffers.
    assert written < 32 * 1024 * 1024
    writer.transport.abort()
    await listener.drain(5.0)


async def test_a_handler_that_fails_ends_its_own_request_only(site: Site, monkeypatch: Any) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(site.front, "ready", broken)
    response = await site.client.get("/ready")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "An internal error occurred."
    assert (await site.client.get("/live")).status_code == 200


async def test_a_header_that_must_not_be_sent_becomes_an_internal_error() -> None:
    async def handler(_: Request, reply: Reply) -> None:
        await reply.send(200, b"{}", [("x-a", "b\r\nx-c: d")])

    listener = await serve_connections(handler, "127.0.0.1", 0, HttpLimits())
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    writer.write(GET)
    status, body = await read_response(reader)
    assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
    writer.transport.abort()
    await listener.drain(5.0)


class ResetTransport(asyncio.Transport):
    """What asyncio leaves when the client's reset came before the end of our answer."""

    aborted = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return self.aborted

    def write_eof(self) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    def abort(self) -> None:
        self.aborted = True


async def test_a_reset_before_the_lingering_close_ends_the_connection() -> None:
    transport = ResetTransport()
    Outbox(transport, HttpLimits()).close(linger=True)
    assert transport.aborted
