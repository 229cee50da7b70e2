"""Prefix identity: the chain of page digests, shared by engine, KV index and router.

A digest names a page's content together with everything before it. It finds candidates only;
whoever reads a page compares tokens and parent, so a collision is a miss, never a wrong answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

DIGEST_BYTES = 16


def root_digest(numerics_class: str, adapter: str | None, cache_salt: str) -> bytes:
    """The parent of the first page: sequences that differ in any of these never share pages."""
    parts = (numerics_class, adapter or "", cache_salt)
    return xxhash.xxh3_128_digest("\x00".join(f"{len(p)}:{p}" for p in parts).encode())


def page_digest(parent: bytes, token_ids: Sequence[int], media: Sequence[tuple[bytes, int]] = ()) -> bytes:
    """XXH3-128(parent ‖ token ids as int32 ‖ (media digest, offset) of each item overlapping the page)."""
    hasher = xxhash.xxh3_128(parent)
    hasher.update(array("i", token_ids).tobytes())
    for digest, offset in media:
        hasher.update(digest + offset.to_bytes(8, "little"))
    return hasher.digest()
