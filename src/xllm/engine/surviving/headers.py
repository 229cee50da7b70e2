"""The bytes beside surviving pages: one header for the file, one per page. Written and checked here only.

Everything read is taken for garbage until its checksum says otherwise. Checksums are against damage, not
against an enemy: the memory is inherited, and who could write it could write the engine.
"""

from __future__ import annotations

from array import array

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from xllm.engine.memory.pool import PrefixKey
from xllm.prefix import DIGEST_BYTES, page_digest
from xllm.types import PAGE_SIZE

FILE_HEADER_BYTES = 4096
_MAGIC = b"xllm-kv1"
_PREAMBLE = len(_MAGIC) + 4 + 16

EMPTY = 0
VALID = 0x5061_6765
"""Neither a small number nor one bit away from EMPTY."""

PAGE_HEADER = np.dtype(
    [
        ("state", "<u4"),
        ("group", "<u4"),
        ("page", "<u8"),
        ("stamp", "<u8"),
        ("digest", f"V{DIGEST_BYTES}"),
        ("parent", f"V{DIGEST_BYTES}"),
        ("content", "V16"),
        ("tokens", "<i4", (PAGE_SIZE,)),
        ("check", "V16"),
    ]
)
"""`stamp` orders headers by when they were written; `check` covers all between `state` and itself."""

Table = npt.NDArray[np.void]
_STATE_BYTES = 4
_CHECKED_END = PAGE_HEADER.itemsize - 16


class FileHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Whose pages these are. `groups`: (number of pages, bytes of a page) of each KV group."""

    numerics_class: str
    layout_digest: str
    groups: tuple[tuple[int, int], ...]


def write_file_header(where: memoryview, header: FileHeader) -> None:
    body = msgspec.msgpack.encode(header)
    if _PREAMBLE + len(body) > FILE_HEADER_BYTES:
        raise ValueError("more KV groups than the header of surviving pages has room for")
    where[:_PREAMBLE] = _MAGIC + len(body).to_bytes(4, "little") + xxhash.xxh3_128_digest(body)
    where[_PREAMBLE : _PREAMBLE + len(body)] = body


def clear_file_header(where: memoryview) -> None:
    where[:_PREAMBLE] = bytes(_PREAMBLE)


def read_file_header(where: memoryview) -> FileHeader | None:
    """None for an empty, damaged or foreign one."""
    preamble = bytes(where[:_PREAMBLE])
    size = int.from_bytes(preamble[len(_MAGIC) : len(_MAGIC) + 4], "little")
    if not preamble.startswith(_MAGIC) or size > FILE_HEADER_BYTES - _PREAMBLE:
        return None
    body = bytes(where[_PREAMBLE : _PREAMBLE + size])
    if xxhash.xxh3_128_digest(body) != preamble[-16:]:
        return None
    try:
        return msgspec.msgpack.decode(body, type=FileHeader)
    except msgspec.DecodeError:
        return None


def content_digest(page: npt.NDArray[np.uint8]) -> bytes:
    return xxhash.xxh3_128_digest(page.data)


def write_page_header(
    table: Table, group: int, page: int, stamp: int, key: PrefixKey, content: bytes
) -> None:
    """The state comes last: whoever is interrupted before it has written nothing."""
    record = np.zeros((), PAGE_HEADER)
    record["group"], record["page"], record["stamp"] = group, page, stamp
    record["digest"], record["parent"] = np.void(key.digest), np.void(key.parent)
    record["content"] = np.void(content)
    record["tokens"] = key.tokens
    raw = bytearray(record.tobytes())
    raw[_CHECKED_END:] = xxhash.xxh3_128_digest(raw[_STATE_BYTES:_CHECKED_END])
    at = page * PAGE_HEADER.itemsize
    flat = table.view(np.uint8)
    flat[at + _STATE_BYTES : at + PAGE_HEADER.itemsize] = raw[_STATE_BYTES:]
    table["state"][page] = VALID


def clear_page_header(table: Table, page: int) -> None:
    table["state"][page] = EMPTY


def read_page_header(table: Table, group: int, page: int) -> tuple[PrefixKey, bytes, int] | None:
    """(key, digest of the content, stamp) of a header that is whole and means this very page, else None."""
    at = page * PAGE_HEADER.itemsize
    raw = table.view(np.uint8)[at : at + PAGE_HEADER.itemsize].tobytes()
    if xxhash.xxh3_128_digest(raw[_STATE_BYTES:_CHECKED_END]) != raw[_CHECKED_END:]:
        return None
    record = np.frombuffer(raw, PAGE_HEADER)[0]
    if (int(record["state"]), int(record["group"]), int(record["page"])) != (VALID, group, page):
        return None
    key = PrefixKey(record["digest"].tobytes(), record["parent"].tobytes(), tuple(record["tokens"].tolist()))
    # The name must follow from what it names: this ties tokens and parent to the chain.
    if page_digest(key.parent, array("i", key.tokens)) != key.digest:
        return None
    return key, record["content"].tobytes(), int(record["stamp"])
