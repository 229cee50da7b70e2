"""Who may ask: bearer keys, the Host header and browser origins. Decided on the head and the peer's address.

Deny by default: every path that is not listed public needs a key, whether it exists or not, so
access never depends on how a path is read later.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from xllm.api.caller import Caller
from xllm.api.http.head import Head
from xllm.errors import AccessError, RequestError

PUBLIC_PATHS = frozenset({"/health", "/live", "/ready"})


class KeyRing:
    """Accepted keys, kept as digests; without keys everybody is accepted.

    An admin key may do all that a key may. Without admin keys, administration is for this machine: a
    peer on loopback that nobody forwarded, with a key if the server has any.
    """

    def __init__(self, keys: Iterable[str], admin_keys: Iterable[str] = ()) -> None:
        self._digests = _digests(keys)
        self._admin_digests = _digests(admin_keys)

    def check(self, head: Head, peer: str = "", *, admin: bool = False) -> Caller:
        """The caller, who may use the route. `peer` is the address of the other end.

        Raises AccessError: one text and the same work whatever is wrong with a key; permission_denied
        when the key is good, but not for an `admin` route.
        """
        if head.path in PUBLIC_PATHS:
            return Caller()
        digest = _digest(_bearer(head))
        is_user, has_admin_key = _among(digest, self._digests), _among(digest, self._admin_digests)
        known = is_user or has_admin_key
        is_open = not self._digests and not (admin and self._admin_digests)
        if not known and not is_open:
            raise AccessError("A valid API key is needed: 'Authorization: Bearer KEY'.")
        is_admin = has_admin_key or (not self._admin_digests and _is_this_machine(head, peer))
        if admin and not is_admin:
            raise AccessError(
                "This route is for administrators: send an admin key, or ask from the server's own machine.",
                code="permission_denied",
            )
        return Caller(key_id(digest) if known else "", is_admin)


def key_id(digest: bytes) -> str:
    """The name of a key in records and metrics; 64 bits of a hash, from which no key can be had back."""
    return digest.hex()[:16]


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


def _bearer(head: Head) -> bytes:
    given = head.values(b"authorization")
    scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return key if scheme.lower() == b"bearer" else b""


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(_digest(k.encode("utf-8")) for k in keys if k)


def _among(digest: bytes, known: tuple[bytes, ...]) -> bool:
    # No early exit: the time tells nothing about which key it was.
    return any([hmac.compare_digest(digest, d) for d in known])


def _is_this_machine(head: Head, peer: str) -> bool:
    """Whether the request began here. A proxy on this machine speaks for others, and says so."""
    if any(head.values(name) for name in _FORWARDING):
        return False
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


_FORWARDING = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
