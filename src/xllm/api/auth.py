"""Who may ask: bearer keys, the Host header and browser origins. Decided on the head alone.

Deny by default: every path that is not listed public needs a key, whether it exists or not, so
access never depends on how a path is read later.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from xllm.api.http.head import Head
from xllm.errors import AccessError, RequestError

PUBLIC_PATHS = frozenset({"/health", "/live", "/ready"})


class KeyRing:
    """Accepted keys, kept as digests; an empty ring accepts everybody."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(k.encode("utf-8")) for k in keys if k)

    def check(self, head: Head) -> None:
        """Raises AccessError; one text and the same work whatever is wrong."""
        if not self._digests or head.path in PUBLIC_PATHS:
            return
        given = head.values(b"authorization")
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = _digest(key if scheme.lower() == b"bearer" else b"")
        # No early exit: the time tells nothing about which key it was.
        matches = [hmac.compare_digest(digest, d) for d in self._digests]
        if not any(matches):
            raise AccessError("A valid API key is needed: 'Authorization: Bearer KEY'.")


class HostRule:
    """Names under which this server answers: a page that rebinds its own name to us is refused.

    Numeric addresses are always fine (they cannot be rebound); '*' in `allowed` allows every name.
    """

    def __init__(self, bound: str, allowed: Iterable[str]) -> None:
        self._names = {"localhost", bound.lower(), *(a.lower() for a in allowed)}

    def check(self, host: str) -> None:
        """Raises RequestError(bad_host). `host` is lower case, without port; '' = none (HTTP/1.0)."""
        if host in self._names or "*" in self._names or not host or _is_address(host):
            return
        raise RequestError("This server does not answer to that Host; see --allowed-hosts.", code="bad_host")


class CorsRule:
    """Origins that browsers may call from. Credentials mode is never allowed."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origins)

    def headers(self, head: Head) -> list[tuple[str, str]]:
        """Response headers for an allowed origin, else none."""
        given = head.values(b"origin")
        origin = given[0].decode("latin-1") if len(given) == 1 else ""
        if origin == "null" or (origin not in self._origins and "*" not in self._origins) or not origin:
            return []
        return [
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", "x-request-id, x-ignored-params, retry-after"),
            ("vary", "origin"),
        ]

    @staticmethod
    def is_preflight(head: Head) -> bool:
        return head.method == "OPTIONS" and bool(head.values(b"access-control-request-method"))


PREFLIGHT_HEADERS = (
    ("access-control-allow-methods", "GET, POST"),
    ("access-control-allow-headers", "authorization, content-type, x-request-id, x-request-timeout"),
    ("access-control-max-age", "600"),
)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
