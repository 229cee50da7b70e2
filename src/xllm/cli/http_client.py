"""A small HTTP/1.1 client for `bench` and `chat`: one request a connection, body as it arrives.

General clients cost more time per chunk than a small model takes to make a token; the generator
must not be the limit (`benchmarks/client_limit.py` measures it). Not for untrusted servers.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from xllm.errors import ConfigError

READ_BYTES = 64 * 1024
MAX_LINE_BYTES = 64 * 1024


class TransportError(Exception):
    """The exchange broke: refused, reset, or no HTTP."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go. `prefix` is the path part of the base URL, without a trailing slash."""

    host: str
    port: int
    tls: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Server:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url {url}: write http://HOST:PORT")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.hostname, port, parts.scheme == "https", parts.path.rstrip("/").removesuffix("/v1"))


@dataclass(slots=True)
class Response:
    status: int
    headers: dict[str, str]
    body: AsyncIterator[bytes]

    async def read(self) -> bytes:
        return b"".join([part async for part in self.body])


class Exchange:
    """One request and its response; use as an async context manager, which closes the connection."""

    def __init__(
        self, server: Server, method: str, path: str, payload: Any = None, api_key: str = ""
    ) -> None:
        self._server = server
        body = b"" if payload is None else json.dumps(payload, separators=(",", ":")).encode()
        head = [
            f"{method} {server.prefix}{path} HTTP/1.1",
            f"Host: {server.host}:{server.port}",
            "Accept: */*",
            "Connection: close",
            f"Content-Length: {len(body)}",
            "Content-Type: application/json",
        ]
        if api_key:
            head.append(f"Authorization: Bearer {api_key}")
        self._request = "\r\n".join(head).encode() + b"\r\n\r\n" + body
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Response:
        context = ssl.create_default_context() if self._server.tls else None
        try:
            reader, self._writer = await asyncio.open_connection(
                self._server.host, self._server.port, ssl=context, limit=MAX_LINE_BYTES
            )
            self._writer.write(self._request)
            await self._writer.drain()
            return await _response(reader)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            await self.__aexit__()
            raise TransportError(f"{type(error).__name__}") from error

    async def __aexit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


async def _response(reader: asyncio.StreamReader) -> Response:
    status_line = await reader.readline()
    words = status_line.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1."):
        raise EOFError
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _chunks(reader)
    elif "content-length" in headers:
        body = _exactly(reader, int(headers["content-length"]))
    else:
        body = _until_eof(reader)
    return Response(int(words[1]), headers, body)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    try:
        while size := int((await reader.readline()).split(b";")[0] or b"x", 16):
            data = await reader.readexactly(size + 2)
            yield data[:-2]
    except (OSError, EOFError, ValueError) as error:
        raise TransportError("body cut short") from error


async def _exactly(reader: asyncio.StreamReader, length: int) -> AsyncIterator[bytes]:
    try:
        yield await reader.readexactly(length)
    except (OSError, EOFError) as error:
        raise TransportError("body cut short") from error


async def _until_eof(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(READ_BYTES):
        yield data


async def events(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The `data:` payloads of a server-sent event stream, comments left out."""
    rest = b""
    async for part in body:
        rest += part
        if b"\r" in rest:
            rest = rest.replace(b"\r\n", b"\n")
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield line[5:].strip()
