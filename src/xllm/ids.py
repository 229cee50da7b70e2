"""Identities made by the server. A client's id is echoed and logged, never used as a key."""

from __future__ import annotations

import re
import secrets

_ECHOABLE = re.compile(r"[A-Za-z0-9._-]{1,128}")


def new_request_id() -> str:
    """128 random bits as 32 hex digits; the key of a request everywhere inside."""
    return secrets.token_hex(16)


def new_seed() -> int:
    """A seed drawn by the front when the request brings none; recorded, so resume is exact."""
    return secrets.randbits(63)


def echoable(client_id: str | None) -> str | None:
    """`client_id` if it is safe to echo in a header or log line, else None."""
    if client_id is not None and _ECHOABLE.fullmatch(client_id):
        return client_id
    return None
