"""The directory of packed weights: finds, builds once, shares, and keeps within bounds.

One file per (weights, class, library), under a name that is its key. Whatever goes wrong costs the cache and
never the start: the reason becomes a report line. The format is `packed_file`'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from xllm.engine.kernels.native.handles import Matrix, Values
from xllm.engine.kernels.native.packed_file import Entry, Item, PackedFile, PackedFileError, write_packed
from xllm.engine.kernels.native.packing import Packer
from xllm.engine.kernels.ops import Buffer
from xllm.errors import InternalError

MAX_BYTES = 32 << 30
"""What all files of a directory may take together; the least recently used go first."""

_SPARE_BYTES = 1 << 30
"""Left free on the disk in any case."""

_OWN = re.compile(r"[0-9a-f]{32}\.packed")
_PART = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{16}\.part")
_STALE_S = 3600.0
_WAIT_S = 120.0
_POLL_S = 0.02

Build = Callable[[], dict[str, Buffer]]


class WeightsCache:
    """Loads one model's parameters. `key` (32 hex digits) names weights, class and library.

    `still` says after building whether the key still names what was read; `report` grows line by line.
    """

    def __init__(self, directory: Path, key: str, packer: Packer, still: Callable[[], bool]) -> None:
        self._directory = directory
        self._key = key
        self._path = self.path(directory, key)
        self._packer = packer
        self._still = still
        self.report: list[str] = []

    @staticmethod
    def path(directory: Path, key: str) -> Path:
        """Where the file is, or will be."""
        return directory / f"{key}.packed"

    def handles(self, wanted: Mapping[str, tuple[int, ...]], build: Build) -> dict[str, Buffer]:
        """The parameters `wanted` (name → shape): mapped, or built, kept, and then mapped all the same,
        so that the first engine of a host shares its memory with the later ones."""
        found = self._find(wanted)
        if found is not None:
            return found
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._locked())
            except (OSError, PackedFileError) as error:
                self._not_kept(error)
                return build()
            # Whoever held the lock may have made what we need.
            found = self._find(wanted, again=True)
            if found is None:
                self._packer.num_bytes.clear()
                found = build()
                found = self._kept(wanted, found) or found
        return found

    def _find(self, wanted: Mapping[str, tuple[int, ...]], again: bool = False) -> dict[str, Buffer] | None:
        started_s = time.monotonic()
        self._packer.num_bytes.clear()
        try:
            file = PackedFile(self._path, self._key)
            _check_complete(file, wanted)
            found = {entry.name: self._handle(file, entry) for entry in file.entries}
        except FileNotFoundError:
            return None
        except (PackedFileError, InternalError, OSError) as error:
            if not again:
                self.report.append(f"packed weights of an earlier start are not used: {_why(error)}")
            return None
        with contextlib.suppress(OSError):
            os.utime(self._path)  # when it was last used, for `_remove_old`
        self.report.append(
            f"weights_cache={file.num_bytes >> 20} MiB mapped in {time.monotonic() - started_s:.2f} s, "
            f"shared by the engines of this host: {self._path.name[:12]} in {self._directory}"
        )
        return found

    def _handle(self, file: PackedFile, entry: Entry) -> Buffer:
        content = file.content(entry)
        if entry.record:
            return Buffer(self._packer.over(entry.record, content, entry.shape))
        if content.nbytes != 4 * math.prod(entry.shape):
            raise PackedFileError("a vector does not fit its shape")
        return Buffer(Values(content.view("<f4").reshape(entry.shape)))

    def _kept(
        self, wanted: Mapping[str, tuple[int, ...]], built: Mapping[str, Buffer]
    ) -> dict[str, Buffer] | None:
        """The same handles over the new file, or None and a report line."""
        try:
            self._write([self._item(name, built[name]) for name in wanted])
            removed = self._remove_old()
        except (OSError, PackedFileError) as error:
            self._not_kept(error)
            return None
        if removed:
            self.report.append(f"weights_cache: {removed >> 20} MiB of files used longest ago are removed")
        return self._find(wanted)

    def _item(self, name: str, handle: Buffer) -> Item:
        if isinstance(handle, Values):
            content = handle.array.reshape(-1).view(np.uint8)
            return Item(name=name, shape=handle.array.shape, record=b"", content=content)
        if not isinstance(handle, Matrix):
            raise TypeError("a handle of another kind or backend")
        record, panels = self._packer.stored(handle)
        return Item(name=name, shape=(handle.num_out, handle.num_in), record=record, content=panels)

    def _write(self, items: list[Item]) -> None:
        """Under a name of its own first: nobody ever sees half a file."""
        if not self._still():
            raise PackedFileError("the model's files changed a moment ago")
        size = sum(item.content.nbytes for item in items)
        free = shutil.disk_usage(self._directory).free
        if free < size + _SPARE_BYTES:
            raise PackedFileError(f"they take {size >> 20} MiB and {free >> 20} MiB of disk are free")
        part = self._directory / f".{self._key}.{secrets.token_hex(8)}.part"
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                write_packed(fd, self._key, items)
            finally:
                os.close(fd)
            part.replace(self._path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The directory, made if need be, to ourselves: engines that start together pack once.

        A holder that takes too long is not waited for: two writers do each other no harm.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = self._directory.stat()
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise PackedFileError(f"others may write to {self._directory}")
        fd = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _wait_for(fd, time.monotonic() + _WAIT_S)
            yield
        finally:
            os.close(fd)

    def _remove_old(self) -> int:
        """Bytes removed to stay within MAX_BYTES; the file just written stays. Mappings outlive a removal."""
        files: list[tuple[float, int, Path]] = []
        for path in self._directory.iterdir():
            facts = path.lstat()
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
                continue
            if _PART.fullmatch(path.name) and time.time() - facts.st_mtime > _STALE_S:
                path.unlink(missing_ok=True)  # its writer died
            elif _OWN.fullmatch(path.name) and path != self._path:
                files.append((facts.st_mtime, facts.st_size, path))
        total, removed = self._path.stat().st_size, 0
        for _, size, path in sorted(files, reverse=True):
            total += size
            if total > MAX_BYTES:
                path.unlink(missing_ok=True)
                removed += size
        return removed

    def _not_kept(self, error: Exception) -> None:
        self.report.append(f"weights_cache: the packed weights are not kept: {_why(error)}")


def _check_complete(file: PackedFile, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Every parameter, in its shape; rows may have been added up to a multiple of 16."""
    shapes = {entry.name: entry.shape for entry in file.entries}
    if shapes.keys() != wanted.keys() or len(shapes) != len(file.entries):
        raise PackedFileError("it holds other parameters")
    for name, (rows, *rest) in wanted.items():
        found_rows, *found_rest = shapes[name] or (0,)
        if found_rest != rest or found_rows not in (rows, -(-rows // 16) * 16):
            raise PackedFileError("its parameters have other shapes")


def _wait_for(fd: int, until_s: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until_s:
                return
            time.sleep(_POLL_S)
        else:
            return


def _why(error: Exception) -> str:
    return error.strerror or "unknown" if isinstance(error, OSError) else str(error)
