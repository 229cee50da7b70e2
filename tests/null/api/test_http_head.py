"""Heads and bodies at the byte level: what is accepted is what every careful reader would read."""

from __future__ import annotations

import http.client
import io

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.api.http.cycle import Cycle
from xllm.api.http.head import Head
from xllm.api.http.inbox import Inbox
from xllm.api.http.limits import HttpLimits
from xllm.errors import RequestError

LIMITS = HttpLimits()
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def opened(wire: bytes, limits: HttpLimits = LIMITS) -> tuple[Cycle, Head, Inbox]:
    """The way of a head through the server, without a connection."""
    inbox = Inbox(limits)
    inbox.add(wire)
    block = inbox.take_head()
    assert block is not None
    cycle = Cycle(limits)
    return cycle, cycle.read_head(block), inbox


def head_of(*lines: str) -> Head:
    return opened("\r\n".join([*lines, "", ""]).encode("latin-1"))[1]


def test_an_ordinary_head() -> None:
    head = head_of(
        "POST /v1/completions?a=b HTTP/1.1", "Host: LocalHost:8000", "Content-Length: 12", "X-A:  b "
    )
    assert (head.method, head.path, head.query, head.host) == ("POST", "/v1/completions", "a=b", "localhost")
    assert (head.content_length, head.chunked) == (12, False)
    assert head.values(b"x-a") == [b"b"]


def test_the_path_is_not_decoded() -> None:
    assert head_of("GET /v1/%2e%2e/x HTTP/1.1", "Host: a").path == "/v1/%2e%2e/x"


@pytest.mark.parametrize(
    ("line", "keep"),
    [
        ("GET / HTTP/1.1|Host: a", True),
        ("GET / HTTP/1.1|Host: a|Connection: Close", False),
        ("GET / HTTP/1.1|Host: a|Connection: x, close", False),
        ("GET / HTTP/1.1|Host: a|Connection: upgrade|Upgrade: h2c", True),
        ("GET / HTTP/1.0", False),
        # h11 keeps no HTTP/1.0 connection open, whatever it asks for.
        ("GET / HTTP/1.0|Connection: keep-alive", False),
    ],
)
def test_keep_alive(line: str, keep: bool) -> None:
    cycle, _, _ = opened("\r\n".join([*line.split("|"), "", ""]).encode())
    sent = cycle.start(200, [("content-length", "0")], close=False) + cycle.end()
    assert cycle.may_go_on is keep
    assert (b"\r\nconnection: close\r\n" in sent.lower()) is not keep


@pytest.mark.parametrize(
    ("method", "version", "length"),
    [("GET", "1.1", None), ("GET", "1.0", None), ("GET", "1.1", "11"), ("HEAD", "1.1", None)],
)
def test_pieces_of_a_body_are_framed_as_h11_frames_them(
    method: str, version: str, length: str | None
) -> None:
    cycle, _, _ = opened(f"{method} / HTTP/{version}\r\nHost: a\r\n\r\n".encode())
    other = h11.Connection(h11.SERVER)
    other.receive_data(f"{method} / HTTP/{version}\r\nHost: a\r\n\r\n".encode())
    other.next_event()
    headers = [] if length is None else [("content-length", length)]
    ours = cycle.start(200, headers, close=False)
    theirs = other.send(h11.Response(status_code=200, headers=headers, reason=b"OK"))
    assert ours == theirs
    for piece in (b"a", b"", b"0123456789"):
        if method == "HEAD":
            assert cycle.data(piece) == b""
        else:
            assert cycle.data(piece) == other.send(h11.Data(data=piece))
    assert cycle.end() == other.send(h11.EndOfMessage())
    with pytest.raises(h11.LocalProtocolError):
        cycle.data(b"late") if method != "HEAD" else cycle.end()


@pytest.mark.parametrize("host", ["[::1]:80", "127.0.0.1", "a.b-c_d:65535"])
def test_host_forms(host: str) -> None:
    assert head_of("GET / HTTP/1.1", f"Host: {host}").host == host.rsplit(":80", 1)[0].split(":65535")[
        0
    ].strip("[]")


@pytest.mark.parametrize("host", ["", "a b", "x/?", "x#", "a@b", "a:99999", "a:", "a:b", "[::1", "é"])
def test_bad_hosts(host: str) -> None:
    with pytest.raises(RequestError):
        head_of("GET / HTTP/1.1", f"Host: {host}")


@pytest.mark.parametrize(
    "lines",
    [
        "GET / HTTP/1.1|Host: a\nX: b",
        "GET / HTTP/1.1|Host: a|X: b| c",
        "GET / HTTP/1.1|Host: a|X: b\x01",
        "GET / HTTP/1.1|Host: a|X: b\x7f",
        "POST / HTTP/1.1|Host: a|Content-Length: 5|content-length: 5",
        "POST / HTTP/1.1|Host: a|Content-Length: 5, 5",
        "POST / HTTP/1.1|Host: a|Content-Length: 18446744073709551616",
        "POST / HTTP/1.1|Host: a|Content-Length: 5|Transfer-Encoding: chunked",
        "POST / HTTP/1.0|Host: a|Transfer-Encoding: chunked",
        "GET http://a/ HTTP/1.1|Host: a",
        "GET /%zz HTTP/1.1|Host: a",
        "CONNECT / HTTP/1.1|Host: a",
        "GET / HTTP/1.2|Host: a",
    ],
)
def test_what_h11_would_accept_is_refused_before(lines: str) -> None:
    wire = "\r\n".join([*lines.split("|"), "", ""]).encode("latin-1")
    other = h11.Connection(h11.SERVER)
    other.receive_data(wire)
    assert isinstance(other.next_event(), h11.Request)  # else our own rule would be superfluous
    with pytest.raises(RequestError):
        opened(wire)


def test_one_empty_line_before_a_request_is_skipped_and_no_more() -> None:
    assert opened(b"\r\nGET / HTTP/1.0\r\n\r\n")[1].path == "/"
    inbox = Inbox(LIMITS)
    inbox.add(b"\r\n")
    assert inbox.take_head() is None
    inbox.add(b"\r\n")
    with pytest.raises(RequestError):
        inbox.take_head()


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
def test_an_accepted_head_is_read_the_same_by_a_lenient_parser(
    first: str, lines: list[tuple[str, str, str]]
) -> None:
    block = "\r\n".join([first, "Host: a", *("".join(line) for line in lines), "", ""]).encode()
    try:
        _, ours, _ = opened(block)
    except RequestError:
        return
    # The standard library folds, splits at bare CR and LF and keeps repeated lengths apart.
    stream = io.BytesIO(block)
    method, target, _ = stream.readline().decode().split()
    theirs = http.client.parse_headers(stream)
    assert method == ours.method
    assert target == ours.path + (f"?{ours.query}" if ours.query else "")
    assert [(n.lower().encode(), v.strip().encode()) for n, v in theirs.items()] == list(ours.headers)
    assert not stream.read()


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=5), st.data())
def test_chunked_bodies_are_the_same_however_they_arrive(parts: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(b"%X;x=y\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"
    follows = b"GET / HTTP/1.1\r\n"
    cycle, rest, stream = opened(CHUNKED)[0], b"", wire + follows
    while stream and not cycle.has_whole_request:
        cut = data.draw(st.integers(1, len(stream)))
        rest, stream = cycle.feed(stream[:cut]), stream[cut:]
    assert cycle.has_whole_request
    assert cycle.take_body() == b"".join(parts)
    assert rest + stream == follows


@pytest.mark.parametrize(
    "wire",
    [
        *(b"g\r\n", b"1\r\nxy", b"+1\r\n", b"1\n", b"1" * 10, b"0\r\nX: y\r\n\r\n", b"1 2\r\n", b"\r\n"),
        *(
            b"1\r\nx\n",
            b"0\r\n\n",
            b"1;" + b"x" * 300,
            b"1 \r\n",
            b"1;\x00\r\n",
            b"1\r\nx\r\n\r\n",
            b"0" * 10,
        ),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_bad_chunks_are_refused(wire: bytes, step: int) -> None:
    cycle, _, _ = opened(CHUNKED)
    with pytest.raises(RequestError):
        [cycle.feed(wire[at : at + step]) for at in range(0, len(wire), step)]


def test_crumbs_are_limited_and_ordinary_chunks_are_not() -> None:
    limits = HttpLimits(max_small_chunks=10)
    with pytest.raises(RequestError):
        opened(CHUNKED, limits)[0].feed(b"1\r\nx\r\n" * 12)
    cycle = opened(CHUNKED, limits)[0]
    cycle.feed((b"64\r\n" + b"x" * 100 + b"\r\n") * 1000 + b"0\r\n\r\n")
    assert len(cycle.take_body()) == 100_000


def test_a_chunked_body_is_bounded_while_it_arrives() -> None:
    cycle = opened(CHUNKED, HttpLimits(max_body_bytes=100))[0]
    cycle.feed(b"fff\r\n" + b"x" * 100)
    with pytest.raises(RequestError):
        cycle.feed(b"x")


def test_a_length_ends_the_body_and_gives_back_the_rest() -> None:
    cycle = opened(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n")[0]
    assert cycle.feed(b"ab") == b""
    assert not cycle.has_whole_request
    assert cycle.feed(b"cde") == b"de"
    assert cycle.has_whole_request
    assert cycle.take_body() == b"abc"
