"""The faults of the proxy happen, are counted, and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.faultlab.tcpproxy import HEALTHY, TcpProxy, Toxics


@pytest.fixture
async def proxy() -> AsyncIterator[TcpProxy]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
        except ConnectionError:
            return
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    with TcpProxy(server.sockets[0].getsockname()[1]) as made:
        yield made
        # The server's own connections end with the proxy's; its loop is this one.
        await asyncio.to_thread(made.cut)
    server.close()
    await server.wait_closed()


async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    async with asyncio.timeout(10.0):
        return await reader.readexactly(len(data))


async def test_bytes_pass_unchanged(proxy: TcpProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    big = bytes(range(256)) * 1000
    assert await say(reader, writer, big) == big
    assert (proxy.num_open, proxy.counts["connections"]) == (1, 1)
    writer.close()


@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_ends_open_connections_and_new_ones_work(proxy: TcpProxy, reset: bool) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    await say(reader, writer, b"x")
    assert await asyncio.to_thread(proxy.cut, reset=reset) == 1
    if reset:
        with pytest.raises(ConnectionResetError):
            await reader.read()
    else:
        assert await reader.read() == b""
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await say(reader, writer, b"again") == b"again"
    writer.close()


async def test_a_black_hole_holds_bytes_until_it_ends(proxy: TcpProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    await say(reader, writer, b"x")
    await asyncio.to_thread(proxy.set, Toxics(blackhole=True, way="down"))
    writer.write(b"later")
    while not proxy.counts["held"]:
        await asyncio.sleep(0.001)
    assert not reader._buffer  # type: ignore[attr-defined]
    await asyncio.to_thread(proxy.set, HEALTHY)
    assert await reader.readexactly(5) == b"later"
    writer.close()


async def test_corruption_latency_bandwidth_and_refusal_are_seen_and_counted(proxy: TcpProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    await asyncio.to_thread(proxy.set, Toxics(corrupt_after=2, way="up"))
    assert await say(reader, writer, b"aaaa") == b"aaqa"
    await asyncio.to_thread(proxy.set, Toxics(latency_s=0.01))
    await say(reader, writer, b"b")
    await asyncio.to_thread(proxy.set, Toxics(bandwidth_bytes_s=1000))
    await say(reader, writer, b"c" * 10)
    await asyncio.to_thread(proxy.set, Toxics(refuse=True))
    other, closing = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await other.read() == b""
    closing.close()
    for kind in ("corrupted", "delayed", "slowed", "refused"):
        assert proxy.counts[kind] > 0, kind
    writer.close()
