"""The request head: what is refused on its raw bytes, and what the rest of the house sees of it.

h11 parses; it takes RFC 9112's tolerances on purpose (bare LF, folding, repeated lengths, a length
beside chunks), and request smuggling lives in those. So they are refused before it sees the bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import h11

from xllm.api.http.limits import HttpLimits
from xllm.errors import RequestError

_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
# h11 lets most control bytes pass in values. It refuses a bare CR itself; LF has a rule of its own.
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_FOLDED = re.compile(rb"\n[ \t]")
# h11 makes one length of "5, 5" or of two equal lines; only the raw bytes still show them.
_LENGTH_LINE = re.compile(rb"\ncontent-length:([^\r]*)\r", re.IGNORECASE)
_LENGTH = re.compile(rb"[0-9]{1,18}")
_HOST = re.compile(rb"(?P<name>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?")

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

    def values(self, name: bytes) -> list[bytes]:
        """Every value of a header, in order."""
        return [v for n, v in self.headers if n == name]


def check_start(start: bytes, limits: HttpLimits) -> None:
    """Refuse bytes that can no longer become a good head, before it is complete.

    Raises RequestError (bad_request, headers_too_large).
    """
    if len(start) > limits.max_head_bytes:
        raise RequestError("The request head is too large.", code="headers_too_large")
    line, crlf, _ = start.partition(b"\r\n")
    if crlf:
        _check_request_line(line, limits)
    elif not _METHOD.match(start) or len(line) > limits.max_target_bytes + 64:
        raise _bad("The request does not start with an HTTP method.")


def check_head(block: bytes, limits: HttpLimits) -> None:
    """Refuse what h11 would accept or has no limit for. `block` ends with the empty line.

    Raises RequestError (bad_request, headers_too_large).
    """
    if len(block) > limits.max_head_bytes:
        raise RequestError("The request head is too large.", code="headers_too_large")
    _check_request_line(block.partition(b"\r\n")[0], limits)
    num_lines = block.count(b"\r\n")
    if num_lines - 2 > limits.max_headers:
        raise RequestError("The request has too many headers.", code="headers_too_large")
    if block.count(b"\n") != num_lines:
        raise _bad("A line does not end in CRLF.")
    if _FOLDED.search(block) or _CONTROL.search(block):
        raise _bad("A header line is not valid.")
    lengths = _LENGTH_LINE.findall(block)
    if len(lengths) > 1:
        raise _bad("The length of the body is given more than once.")
    if lengths and not _LENGTH.fullmatch(lengths[0].strip(b" \t")):
        raise _bad("The Content-Length is not a number.")


def read_head(request: h11.Request) -> Head:
    """What h11 read, as the house's own value. `request` passed `check_head` on its bytes.

    Raises RequestError: bad_request, expectation_failed.
    """
    headers = tuple(request.headers)
    http_1_0 = request.http_version == b"1.0"
    lengths = [v for n, v in headers if n == b"content-length"]
    chunked = any(n == b"transfer-encoding" for n, _ in headers)
    if chunked and (lengths or http_1_0):
        raise _bad("Chunks need HTTP/1.1 and no length beside them.")
    if any(n == b"expect" and v.lower() != b"100-continue" for n, v in headers):
        raise RequestError("The expectation cannot be met.", code="expectation_failed")
    target = request.target.decode("ascii")
    path, _, query = ("/*" if target == "*" else target).partition("?")
    return Head(
        method=request.method.decode("ascii"),
        path=path,
        query=query,
        http_1_0=http_1_0,
        headers=headers,
        host=_host(headers, http_1_0),
        content_length=int(lengths[0]) if lengths else None,
        chunked=chunked,
    )


def _bad(message: str) -> RequestError:
    return RequestError(message, code="bad_request")


def _check_request_line(line: bytes, limits: HttpLimits) -> None:
    """Stricter than h11: two versions, origin-form targets only, whole escapes, bounded lengths."""
    parts = line.split(b" ")
    if len(parts) != 3 or not _METHOD.fullmatch(parts[0]):
        raise _bad("The request line is not valid.")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise _bad("Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    if target == b"*" and method == b"OPTIONS":
        return
    # CONNECT has an authority for a target and would make a tunnel of the connection.
    if method == b"CONNECT" or len(target) > limits.max_target_bytes:
        raise _bad("The request target is not valid.")
    if not _TARGET.fullmatch(target) or _BAD_ESCAPE.search(target):
        raise _bad("The request target is not valid.")


def _host(headers: Headers, http_1_0: bool) -> str:
    """The host name in lower case, without port or brackets; '' when HTTP/1.0 leaves it out."""
    hosts = [v for n, v in headers if n == b"host"]
    if not hosts and http_1_0:
        return ""
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None or int(match["port"] or 0) > 65535:
        raise _bad("The request needs exactly one valid Host header.")
    return match["name"].decode("ascii").lower().strip("[]")
