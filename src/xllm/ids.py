"""Identities made by the server. A client's id is echoed and logged, never used as a key."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ECHOABLE = re.compile(r"[A-Za-z0-9._-]{1,128}")

_draw_bits: Callable[[int], int] = secrets.randbits


def new_request_id() -> str:
    """128 random bits as 32 hex digits; the key of a request everywhere inside."""
    return f"{_draw_bits(128):032x}"


def new_transfer_id() -> str:
    """The name of a transfer between engines; who knows it may bring or fetch its pages."""
    return f"{_draw_bits(128):032x}"


def new_seed() -> int:
    """A seed drawn by the front when the request brings none; recorded, so resume is exact."""
    return _draw_bits(63)


@contextmanager
def predictable(draw_bits: Callable[[int], int]) -> Iterator[None]:
    """Draw ids and seeds from `draw_bits` meanwhile: for simulations, which a seed must reproduce.

    Never in a process that serves: whoever can guess an id can end another's request.
    """
    global _draw_bits
    kept, _draw_bits = _draw_bits, draw_bits
    try:
        yield
    finally:
        _draw_bits = kept


def echoable(client_id: str | None) -> str | None:
    """`client_id` if it is safe to echo in a header or log line, else None."""
    if client_id is not None and _ECHOABLE.fullmatch(client_id):
        return client_id
    return None
