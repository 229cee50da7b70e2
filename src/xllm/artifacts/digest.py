"""Cheap names for large weight files: a fingerprint of what is in them, and an identity of the files.

Neither reads every byte: the fingerprint samples, the identity trusts the file system's change times.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

_NUM_BLOCKS = 64
_BLOCK_BYTES = 4096
_HEAD_BYTES = 1 << 20
_SETTLED_NS = 100_000_000
"""A file changed less than this ago may change again without its times showing it."""


def sampled_digest(files: Iterable[Path], extra: bytes = b"") -> str:
    """`sampled-sha256:<hex>` over each file's name, size, first MiB and 64 evenly spread 4 KiB blocks.

    Two trainings of the same shape differ; deliberate forgery is not detected.
    """
    digest = hashlib.sha256(extra)
    for path in sorted(files):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"\0{path.name}\0{size}\0".encode())
            digest.update(file.read(_HEAD_BYTES))
            for i in range(_NUM_BLOCKS):
                file.seek(size * i // _NUM_BLOCKS)
                digest.update(file.read(_BLOCK_BYTES))
    return f"sampled-sha256:{digest.hexdigest()}"


def files_identity(opened: Sequence[tuple[Path, os.stat_result]]) -> str:
    """Names the files that were opened with these facts; "" when they are not known to be unchanged since.

    Equal identities mean equal bytes unless somebody forges a change time, which the kernel lets nobody do
    short of setting the clock. A copy or a touched file is another one: that costs a rebuild, no more.
    """
    digest = hashlib.sha256()
    for path, then in opened:
        try:
            now = path.stat()
        except OSError:
            return ""
        facts = _facts(now)
        if facts != _facts(then) or time.time_ns() - now.st_ctime_ns < _SETTLED_NS:
            return ""
        digest.update(f"\0{path.resolve()}\0{facts}\0".encode("utf-8", "surrogateescape"))
    digest.update(sampled_digest([path for path, _ in opened]).encode())
    return digest.hexdigest()


def _facts(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
