"""Packed weights as one file: written once, checked in full, then mapped read-only and shared by processes.

Layout: preamble (magic, version, sizes, checksums), a msgpack table of entries, then their bytes on cache
lines. Knows no directory policy and calls no kernel; what a matrix's record means is the library's matter.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

Bytes = npt.NDArray[np.uint8]

MAGIC = b"XLLMPACK"
VERSION = 1
MAX_TABLE_BYTES = 16 << 20

_PREAMBLE = struct.Struct("<8sIIQ16s16s")
"""Magic, version, bytes of the table, bytes of the file, checksums of table and content."""

_LINE = 64
_PAGE = 4096
_CHUNK = 8 << 20
"""Written in pieces of whole huge pages, which file systems that can then keep as such: a mapping of them
is as fast as anonymous huge pages, one of 4 KiB pages 5 % to 15 % slower."""

_POPULATE_READ = 22  # MADV_POPULATE_READ, which this Python's mmap does not name


class PackedFileError(Exception):
    """Why a file cannot be used: one clause for the start-up report."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """`record` is a matrix's, empty for a float32 vector; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    record: bytes
    offset: int
    num_bytes: int


class _Table(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    entries: tuple[Entry, ...]


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be written: see `Entry`."""

    name: str
    shape: tuple[int, ...]
    record: bytes
    content: Bytes


class PackedFile:
    """A checked, mapped file. Arrays of `content` keep the mapping alive."""

    def __init__(self, path: Path, key: str) -> None:
        """Map it and check everything: owner, sizes, key, every offset, both checksums.

        Raises FileNotFoundError if there is none, PackedFileError if it cannot be trusted.
        """
        data = _mapped(path)
        table, content_sum = _checked_table(data, key)
        start = min((e.offset for e in table.entries), default=len(data))
        # Also brings the pages in, so that no first request waits for them.
        if xxhash.xxh3_128_digest(memoryview(data)[start:]) != content_sum:
            raise PackedFileError("its content is damaged")
        self.entries = table.entries
        self.num_bytes = len(data)
        self._bytes: Bytes = np.frombuffer(data, dtype=np.uint8)

    def content(self, entry: Entry) -> Bytes:
        """A read-only view of the entry's bytes, on a cache line."""
        return self._bytes[entry.offset : entry.offset + entry.num_bytes]


def write_packed(fd: int, key: str, items: Sequence[Item]) -> int:
    """Write everything to the empty file `fd` and make it durable; returns its size. Raises OSError."""
    table, total = _laid_out(key, items)
    encoded = msgspec.msgpack.encode(table)
    os.posix_fallocate(fd, 0, total)  # a full disk says so now and not at some page
    out = _Chunks(fd)
    out.skip_to(min((e.offset for e in table.entries), default=total))
    hasher = xxhash.xxh3_128()
    for entry, item in zip(table.entries, items, strict=True):
        hasher.update(out.skip_to(entry.offset))
        hasher.update(item.content.data)
        out.write(item.content.data)
    hasher.update(out.skip_to(total))
    out.flush()
    sums = (xxhash.xxh3_128_digest(encoded), hasher.digest())
    os.pwrite(fd, _PREAMBLE.pack(MAGIC, VERSION, len(encoded), total, *sums) + encoded, 0)
    os.fsync(fd)
    return total


def _laid_out(key: str, items: Sequence[Item]) -> tuple[_Table, int]:
    """The table and the size of the file. Offsets are encoded at full width, so the table's size is known."""
    bound = _PREAMBLE.size + len(msgspec.msgpack.encode(_table_at(key, items, 1 << 62)[0]))
    return _table_at(key, items, -(-bound // _PAGE) * _PAGE)


def _table_at(key: str, items: Sequence[Item], offset: int) -> tuple[_Table, int]:
    entries = []
    for item in items:
        size = item.content.nbytes
        entry = Entry(name=item.name, shape=item.shape, record=item.record, offset=offset, num_bytes=size)
        entries.append(entry)
        offset += -(-size // _LINE) * _LINE
    return _Table(key=key, entries=tuple(entries)), offset


class _Chunks:
    """Sequential output in aligned pieces of `_CHUNK`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = memoryview(bytearray(_CHUNK))
        self._start = 0
        self._fill = 0

    def skip_to(self, offset: int) -> bytes:
        """Zeros up to `offset` of the file; returns them."""
        zeros = bytes(offset - self._start - self._fill)
        self.write(memoryview(zeros))
        return zeros

    def write(self, data: memoryview) -> None:
        while len(data):
            count = min(len(data), _CHUNK - self._fill)
            self._buffer[self._fill : self._fill + count] = data[:count]
            self._fill += count
            data = data[count:]
            if self._fill == _CHUNK:
                self.flush()

    def flush(self) -> None:
        done = 0
        while done < self._fill:
            done += os.pwrite(self._fd, self._buffer[done : self._fill], self._start + done)
        self._start += self._fill
        self._fill = 0


def _mapped(path: Path) -> mmap.mmap:
    try:
        # Without waiting: it may be a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PackedFileError(f"it cannot be opened ({error.strerror})") from error
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise PackedFileError("somebody else may write to it")
        if facts.st_size < _PREAMBLE.size:
            raise PackedFileError("it is cut off")
        data = mmap.mmap(fd, facts.st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise PackedFileError("it cannot be mapped") from error
    finally:
        os.close(fd)
    for advice in (mmap.MADV_HUGEPAGE, _POPULATE_READ):
        with contextlib.suppress(OSError):  # a kernel without it maps pages as they are read
            data.madvise(advice)
    return data


def _checked_table(data: mmap.mmap, key: str) -> tuple[_Table, bytes]:
    magic, version, table_bytes, total, table_sum, content_sum = _PREAMBLE.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise PackedFileError("it has another format")
    if total != len(data) or table_bytes > min(MAX_TABLE_BYTES, total - _PREAMBLE.size):
        raise PackedFileError("it is cut off")
    encoded = data[_PREAMBLE.size : _PREAMBLE.size + table_bytes]
    if xxhash.xxh3_128_digest(encoded) != table_sum:
        raise PackedFileError("its table is damaged")
    try:
        table = msgspec.msgpack.decode(encoded, type=_Table)
    except msgspec.DecodeError as error:
        raise PackedFileError("its table is damaged") from error
    if table.key != key:
        raise PackedFileError("it belongs to other weights")
    end = _PREAMBLE.size + table_bytes
    for entry in table.entries:
        if entry.offset % _LINE or entry.offset < end or not 0 < entry.num_bytes <= total - entry.offset:
            raise PackedFileError("its table points outside")
        end = entry.offset + entry.num_bytes
    return table, content_sum
