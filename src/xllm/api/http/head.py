"""The request head, read strictly: what two readers could understand differently is refused.

No tolerance of RFC 9112 is used where it allows one (bare LF, folding, repeated lengths, absolute
targets): request smuggling lives in those. Pure functions over bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from xllm.api.http.limits import HttpLimits
from xllm.errors import RequestError

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_METHOD = re.compile(_TOKEN + rb"{1,32}")
_NAME = re.compile(_TOKEN + rb"+")
# Visible ASCII and obs-text; no control bytes but the tab.
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_HOST = re.compile(rb"(?P<name>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?")
_LENGTH = re.compile(rb"[0-9]{1,18}")

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """`path` is the raw path, never decoded: routes and access are decided on the same bytes.

    Header names are lower case. `content_length` is None without a body or with a chunked one.
    """

    method: str
    path: str
    query: str
    http_1_0: bool
    headers: Headers
    host: str
    content_length: int | None
    chunked: bool
    keep_alive: bool
    expects_continue: bool

    def values(self, name: bytes) -> list[bytes]:
        """Every value of a header, in order."""
        return [v for n, v in self.headers if n == name]

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.content_length)


def check_start(start: bytes, limits: HttpLimits) -> None:
    """Refuse bytes that can no longer become a good head, before it is complete.

    Raises RequestError (bad_request, headers_too_large).
    """
    if len(start) > limits.max_head_bytes:
        raise RequestError("The request head is too large.", code="headers_too_large")
    line, crlf, _ = start.partition(b"\r\n")
    if crlf:
        _request_line(line, limits)
    elif not _METHOD.match(start) or len(line) > limits.max_target_bytes + 64:
        raise _bad("The request does not start with an HTTP method.")


def parse_head(block: bytes, limits: HttpLimits) -> Head:
    """`block` is everything before the empty line, without it.

    Raises RequestError: bad_request, headers_too_large, expectation_failed.
    """
    if len(block) > limits.max_head_bytes:
        raise RequestError("The request head is too large.", code="headers_too_large")
    first, *lines = block.split(b"\r\n")
    method, target, http_1_0 = _request_line(first, limits)
    if len(lines) > limits.max_headers:
        raise RequestError("The request has too many headers.", code="headers_too_large")
    headers = tuple(_header(line) for line in lines)
    length, chunked = _framing(headers, http_1_0)
    connection = b",".join(v.lower() for n, v in headers if n == b"connection")
    options = {o.strip() for o in connection.split(b",")}
    path, _, query = target.decode("ascii").partition("?")
    return Head(
        method=method.decode("ascii"),
        path=path,
        query=query,
        http_1_0=http_1_0,
        headers=headers,
        host=_host(headers, http_1_0),
        content_length=length,
        chunked=chunked,
        keep_alive=b"close" not in options and (not http_1_0 or b"keep-alive" in options),
        expects_continue=_expects_continue(headers),
    )


def _bad(message: str) -> RequestError:
    return RequestError(message, code="bad_request")


def _request_line(line: bytes, limits: HttpLimits) -> tuple[bytes, bytes, bool]:
    parts = line.split(b" ")
    if len(parts) != 3 or not _METHOD.fullmatch(parts[0]):
        raise _bad("The request line is not valid.")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise _bad("Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    if target == b"*" and method == b"OPTIONS":
        target = b"/*"
    if len(target) > limits.max_target_bytes or not _TARGET.fullmatch(target) or _BAD_ESCAPE.search(target):
        raise _bad("The request target is not valid.")
    return method, target, version == b"HTTP/1.0"


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
        raise _bad("A header line is not valid.")
    return name.lower(), value.strip(b" \t")


def _framing(headers: Headers, http_1_0: bool) -> tuple[int | None, bool]:
    lengths = [v for n, v in headers if n == b"content-length"]
    encodings = [v for n, v in headers if n == b"transfer-encoding"]
    if len(lengths) > 1 or len(encodings) > 1 or (lengths and encodings):
        raise _bad("The length of the body is given more than once.")
    if encodings and (http_1_0 or encodings[0].lower() != b"chunked"):
        raise _bad("The only transfer encoding is chunked.")
    if lengths and not _LENGTH.fullmatch(lengths[0]):
        raise _bad("The Content-Length is not a number.")
    return (int(lengths[0]) if lengths else None), bool(encodings)


def _host(headers: Headers, http_1_0: bool) -> str:
    """The host name in lower case, without port or brackets; '' when HTTP/1.0 leaves it out."""
    hosts = [v for n, v in headers if n == b"host"]
    if not hosts and http_1_0:
        return ""
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None or int(match["port"] or 0) > 65535:
        raise _bad("The request needs exactly one valid Host header.")
    return match["name"].decode("ascii").lower().strip("[]")


def _expects_continue(headers: Headers) -> bool:
    expectations = [v.lower() for n, v in headers if n == b"expect"]
    if any(e != b"100-continue" for e in expectations):
        raise RequestError("The expectation cannot be met.", code="expectation_failed")
    return bool(expectations)
