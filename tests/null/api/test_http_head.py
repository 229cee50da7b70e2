"""Heads and bodies at the byte level: what is accepted is what every careful reader would read."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.api.http.body import ChunkedBody, LengthBody
from xllm.api.http.head import Head, parse_head
from xllm.api.http.limits import HttpLimits
from xllm.errors import RequestError

LIMITS = HttpLimits()


def head_of(*lines: str) -> Head:
    return parse_head("\r\n".join(lines).encode("latin-1"), LIMITS)


def test_an_ordinary_head() -> None:
    head = head_of(
        "POST /v1/completions?a=b HTTP/1.1", "Host: LocalHost:8000", "Content-Length: 12", "X-A:  b "
    )
    assert (head.method, head.path, head.query, head.host) == ("POST", "/v1/completions", "a=b", "localhost")
    assert (head.content_length, head.chunked, head.keep_alive) == (12, False, True)
    assert head.values(b"x-a") == [b"b"]


def test_the_path_is_not_decoded() -> None:
    assert head_of("GET /v1/%2e%2e/x HTTP/1.1", "Host: a").path == "/v1/%2e%2e/x"


@pytest.mark.parametrize(
    ("line", "keep"),
    [
        ("GET / HTTP/1.1|Host: a", True),
        ("GET / HTTP/1.1|Host: a|Connection: Close", False),
        ("GET / HTTP/1.1|Host: a|Connection: x, close", False),
        ("GET / HTTP/1.0", False),
        ("GET / HTTP/1.0|Connection: keep-alive", True),
    ],
)
def test_keep_alive(line: str, keep: bool) -> None:
    assert head_of(*line.split("|")).keep_alive is keep


@pytest.mark.parametrize("host", ["[::1]:80", "127.0.0.1", "a.b-c_d:65535"])
def test_host_forms(host: str) -> None:
    assert head_of("GET / HTTP/1.1", f"Host: {host}").host == host.rsplit(":80", 1)[0].split(":65535")[
        0
    ].strip("[]")


@pytest.mark.parametrize("host", ["", "a b", "x/?", "x#", "a@b", "a:99999", "a:", "a:b", "[::1", "é"])
def test_bad_hosts(host: str) -> None:
    with pytest.raises(RequestError):
        head_of("GET / HTTP/1.1", f"Host: {host}")


name = st.sampled_from(
    ["host", "content-length", "transfer-encoding", "expect", "connection", "x", "x y", ""]
)
value = st.sampled_from(
    ["a", "5", "05", "+5", "5,5", "chunked", "identity", "close", "100-continue", "a\tb", "\x00", " b"]
)
start = st.sampled_from(
    ["GET / HTTP/1.1", "POST /a?b HTTP/1.1", "GET  / HTTP/1.1", "GET / HTTP/1.0", "G\x01 / HTTP/1.1"]
)
separator = st.sampled_from([": ", ":", " : ", ":\r", "\n"])


@given(start, st.lists(st.tuples(name, separator, value), max_size=5))
@settings(max_examples=300)
def test_an_accepted_head_is_read_the_same_by_another_parser(
    first: str, lines: list[tuple[str, str, str]]
) -> None:
    block = "\r\n".join([first, "Host: a", *("".join(line) for line in lines)]).encode()
    try:
        ours = parse_head(block, LIMITS)
    except RequestError:
        return
    other = h11.Connection(h11.SERVER)
    other.receive_data(block + b"\r\n\r\n")
    theirs = other.next_event()
    assert isinstance(theirs, h11.Request)
    assert theirs.method.decode() == ours.method
    assert theirs.target.decode() == ours.path + (f"?{ours.query}" if ours.query else "")
    assert [(n, v) for n, v in theirs.headers] == list(ours.headers)


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=5), st.data())
def test_chunked_bodies_are_the_same_however_they_arrive(parts: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(b"%X;x=y\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"
    follows = b"GET / HTTP/1.1\r\n"
    decoder, body, rest, stream = ChunkedBody(), b"", b"", wire + follows
    while stream and not decoder.done:
        cut = data.draw(st.integers(1, len(stream)))
        got, rest = decoder.feed(stream[:cut])
        body, stream = body + got, stream[cut:]
    assert decoder.done
    assert body == b"".join(parts)
    assert rest + stream == follows


@pytest.mark.parametrize(
    "wire", [b"g\r\n", b"1\r\nxy", b"+1\r\n", b"1\n", b"1" * 10, b"0\r\nX: y\r\n\r\n", b"1 2\r\n", b"\r\n"]
)
def test_bad_chunks_are_refused(wire: bytes) -> None:
    with pytest.raises(RequestError):
        ChunkedBody().feed(wire)


def test_a_length_ends_the_body_and_gives_back_the_rest() -> None:
    decoder = LengthBody(3)
    assert decoder.feed(b"ab") == (b"ab", b"")
    assert not decoder.done
    assert decoder.feed(b"cde") == (b"c", b"de")
    assert decoder.done
