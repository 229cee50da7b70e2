"""Hostile HTTP as data: raw bytes to send and what a careful server may answer.

Shared by the server spike (`benchmarks/http_spike.py`) and the integration tests, so that what
was measured before choosing a server is what is held afterwards. No test framework here.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

JSON_BODY = b'{"model": "m", "prompt": "x", "max_tokens": 1}'
HOST = b"Host: localhost\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCase:
    """`send` is written in order with `gap_s` between parts.

    `statuses`: what the first response may be; 0 stands for "closed without a response".
    `layer`: "server" = no application code can repair it; "app" = a handler could.
    """

    name: str
    send: tuple[bytes, ...]
    statuses: frozenset[int]
    layer: str = "server"
    gap_s: float = 0.0
    shutdown_write: bool = False
    max_ok: int = 0
    must_close: bool = True
    within_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came back: statuses in order, whether each error body was JSON with `error`, time to close."""

    statuses: tuple[int, ...]
    json_errors: bool
    closed: bool
    elapsed_s: float
    raw: bytes = b""


def verdict(case: HttpCase, outcome: Outcome) -> str:
    """'' when the outcome is allowed, else the reason it is not."""
    first = outcome.statuses[0] if outcome.statuses else 0
    if first == 0 and not outcome.closed:
        return "no answer, still open"
    if first not in case.statuses:
        return f"status {first}"
    if sum(s == 200 for s in outcome.statuses) > case.max_ok:
        return f"{outcome.statuses.count(200)} requests served"
    if case.must_close and not outcome.closed:
        return "left open"
    return ""


async def run_case(case: HttpCase, host: str, port: int) -> Outcome:
    """Play one case against a listening server; never raises on resets."""
    reader, writer = await asyncio.open_connection(host, port)
    start = time.monotonic()
    received: list[bytes] = []
    closed = asyncio.Event()

    async def read() -> None:
        try:
            while data := await reader.read(65536):
                received.append(data)
        except OSError:
            pass
        closed.set()

    task = asyncio.create_task(read())
    try:
        for i, part in enumerate(case.send):
            if i and case.gap_s:
                await _wait(closed, case.gap_s)
            if closed.is_set() or time.monotonic() - start > case.within_s:
                break
            writer.write(part)
            await asyncio.wait_for(writer.drain(), case.within_s)
        if case.shutdown_write and not closed.is_set():
            writer.write_eof()
    except (OSError, TimeoutError):
        pass
    await _wait(closed, max(0.0, case.within_s - (time.monotonic() - start)), received, case.must_close)
    elapsed = time.monotonic() - start
    task.cancel()
    writer.transport.abort()
    raw = b"".join(received)
    statuses, json_errors = parse_responses(raw)
    return Outcome(
        statuses=statuses, json_errors=json_errors, closed=closed.is_set(), elapsed_s=elapsed, raw=raw
    )


async def _wait(
    event: asyncio.Event, seconds: float, received: list[bytes] | None = None, must_close: bool = True
) -> None:
    deadline = time.monotonic() + seconds
    while not event.is_set() and (left := deadline - time.monotonic()) > 0:
        if received and not must_close:
            left = min(left, 0.3)
        try:
            await asyncio.wait_for(event.wait(), min(left, 0.3))
        except TimeoutError:
            if received and not must_close:
                return


def parse_responses(raw: bytes) -> tuple[tuple[int, ...], bool]:
    """Statuses of the final responses in `raw`; True when each one >= 400 carries a JSON error."""
    statuses: list[int] = []
    all_json = True
    while raw.startswith(b"HTTP/1."):
        head, _, raw = raw.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1][:3])
        headers = {
            k.strip().lower(): v.strip()
            for k, _, v in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        if status < 200:
            continue
        if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            body, _, raw = raw.partition(b"0\r\n\r\n")
        else:
            length = int(headers.get(b"content-length", b"0") or 0)
            body, raw = raw[:length], raw[length:]
        statuses.append(status)
        if status >= 400:
            all_json = all_json and _is_error_json(body)
    return tuple(statuses), all_json


def _is_error_json(body: bytes) -> bool:
    try:
        value = json.loads(body)
    except ValueError:
        return False
    return isinstance(value, dict) and {"message", "type", "param", "code"} == set(value.get("error", ()))


def post(
    *headers: bytes, body: bytes = JSON_BODY, length: bool = True, path: bytes = b"/v1/completions"
) -> bytes:
    """A POST with exactly these extra header lines (without CRLF)."""
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: localhost", b"Content-Type: application/json", *headers]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


GET = b"GET /health HTTP/1.1\r\n" + HOST


def _case(name: str, statuses: str, *send: bytes, **more: object) -> HttpCase:
    allowed = frozenset(int(s) for s in statuses.split())
    return HttpCase(name=name, send=send, statuses=allowed, **more)  # type: ignore[arg-type]


def cases(header_timeout_s: float, body_timeout_s: float, max_body_bytes: int) -> list[HttpCase]:
    """The whole table, for a server that runs with these limits."""
    big = max_body_bytes + 1
    # Wide enough for a server that looks at its clock once a second, too short for one without a clock.
    slow_head, slow_body = header_timeout_s + 2.5, body_timeout_s + 2.5
    return [
        _case(
            "1 TLS hello",
            "0 400",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
            within_s=1.5,
        ),
        _case("1 SSH banner", "0 400", b"SSH-2.0-OpenSSH_9.2\r\n", within_s=1.5),
        _case("2 HTTP/0.9", "0 400 505", b"GET /health\r\n\r\n", within_s=1.5),
        _case("2 HTTP/2 preface", "0 400 505", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", within_s=1.5),
        _case("2 HTTP/3.7", "0 400 505", b"GET /health HTTP/3.7\r\n" + HOST + b"\r\n", within_s=1.5),
        _case(
            "3 slow head", "408", b"GET /health HTTP/1.1\r\n", *([b"X"] * 40), gap_s=0.2, within_s=slow_head
        ),
        _case("3 silent connection", "0 408", b"", within_s=slow_head),
        _case(
            "4 slow body",
            "408",
            post(b"Content-Length: 1048576", body=b"", length=False),
            *([b"x"] * 60),
            gap_s=0.2,
            within_s=slow_body,
        ),
        _case(
            "4 slow chunked body",
            "408",
            post(b"Transfer-Encoding: chunked", body=b"", length=False),
            *([b"1\r\nx\r\n"] * 60),
            gap_s=0.2,
            within_s=slow_body,
        ),
        _case(
            "6 headers 64 KiB + 1",
            "431",
            GET + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(66)) + b"\r\n",
        ),
        _case("6 101 headers", "431", GET + b"".join(b"X-%d: a\r\n" % i for i in range(100)) + b"\r\n"),
        _case("6 1 MiB header name", "431", GET + b"X" * (1 << 20) + b": a\r\n\r\n"),
        _case("7 NUL in a header", "400", GET + b"X-A: a\x00b\r\n\r\n"),
        _case("7 bare LF", "400", b"GET /health HTTP/1.1\nHost: localhost\n\n", within_s=2),
        _case(
            "7 bare LF inside", "400", b"GET /health HTTP/1.1\r\nHost: localhost\nX-A: b\r\n\r\n", within_s=2
        ),
        _case("7 folded header", "400", GET + b"X-A: a\r\n b\r\n\r\n"),
        _case("7 bare CR", "400", GET + b"X-A: a\rX-B: b\r\n\r\n"),
        _case("7 space before colon", "400", GET + b"X-A : a\r\n\r\n"),
        _case("8 two different lengths", "400", post(b"Content-Length: 5")),
        _case("8 two equal lengths", "400", post(b"Content-Length: %d" % len(JSON_BODY))),
        _case("8 length list", "400", post(b"Content-Length: 5, 5", body=b"aaaaa", length=False)),
        _case("8 length and chunked", "400", post(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
        _case("8 xchunked", "400 501", post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n", length=False)),
        _case(
            "8 chunked, identity",
            "400 501",
            post(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n", length=False),
        ),
        _case(
            "8 chunked twice",
            "400 501",
            post(
                b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n", length=False
            ),
        ),
        *(
            _case(
                f"8 length {v.decode()}",
                "400 413",
                post(b"Content-Length: " + v, body=b"aaaaa", length=False),
            )
            for v in (b"+5", b"-1", b"1e3", b"18446744073709551616", b"0x5", b"5 5", b"1_0")
        ),
        _case(
            "9 chunk size overflow",
            "400 413",
            post(b"Transfer-Encoding: chunked", body=b"FFFFFFFFFFFFFFFFF\r\nx", length=False),
        ),
        _case(
            "9 chunk size signed",
            "400",
            post(b"Transfer-Encoding: chunked", body=b"+1\r\nx\r\n0\r\n\r\n", length=False),
        ),
        _case(
            "9 chunk without CRLF",
            "400",
            post(b"Transfer-Encoding: chunked", body=b"1\r\nxyz\r\n0\r\n\r\n", length=False),
        ),
        _case(
            "9 chunk extension 1 MiB",
            "400 431",
            post(b"Transfer-Encoding: chunked", body=b"1;" + b"a" * (1 << 20), length=False),
        ),
        _case(
            "9 chunk bare LF",
            "400",
            post(b"Transfer-Encoding: chunked", body=b"1\nx\n0\n\n", length=False),
            within_s=2,
        ),
        _case(
            "10 length too large, FIN",
            "0 400",
            post(b"Content-Length: 999", length=False),
            shutdown_write=True,
        ),
        _case(
            "10 length too small",
            "200 400 404",
            post(b"Content-Length: 2", body=b'{}{"a": "b"}', length=False),
            max_ok=1,
        ),
        _case("12 unknown Expect", "417", post(b"Expect: 200-maybe"), must_close=False),
        _case(
            "13 body too large by length",
            "413",
            post(b"Content-Length: %d" % big, body=b"", length=False),
            layer="app",
        ),
        _case(
            "13 body too large, chunked",
            "413",
            post(b"Transfer-Encoding: chunked", body=b"", length=False),
            *([b"100000\r\n" + b"x" * 0x100000 + b"\r\n"] * (max_body_bytes // 0x100000 + 1)),
            layer="app",
            within_s=10,
        ),
        *(
            _case(
                f"14 content-encoding {e.decode()}",
                "415",
                post(b"Content-Encoding: " + e),
                layer="app",
                must_close=False,
            )
            for e in (b"gzip", b"br", b"zstd", b"gzip, gzip")
        ),
        _case("16 method with control byte", "400", b"FOO\x01 /health HTTP/1.1\r\n" + HOST + b"\r\n"),
        _case(
            "16 unknown method",
            "405 501 400",
            b"FOO /health HTTP/1.1\r\n" + HOST + b"\r\n",
            layer="app",
            must_close=False,
        ),
        _case(
            "17 8 KiB path",
            "400 404 414",
            b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
            layer="app",
            must_close=False,
        ),
        _case("17 NUL in path", "400", b"GET /a\x00b HTTP/1.1\r\n" + HOST + b"\r\n"),
        _case(
            "17 %zz in path",
            "400 404",
            b"GET /%zz HTTP/1.1\r\n" + HOST + b"\r\n",
            layer="app",
            must_close=False,
        ),
        _case("17 non-ASCII path", "400", b"GET /\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n"),
        _case("18 two Host", "400", GET + b"Host: evil\r\n\r\n"),
        _case("18 no Host", "400", b"GET /health HTTP/1.1\r\n\r\n"),
        *(
            _case(
                f"18 Host {h.decode()}",
                "400 421",
                b"GET /v1/models HTTP/1.1\r\nHost: " + h + b"\r\n\r\n",
                layer="app",
                must_close=False,
            )
            for h in (b"x/?", b"x/#", b"a@b", b"localhost:99999", b"evil.example")
        ),
        _case(
            "18 absolute form",
            "400 421",
            b"GET http://evil/v1/models HTTP/1.1\r\n" + HOST + b"\r\n",
            layer="app",
            must_close=False,
        ),
    ]
