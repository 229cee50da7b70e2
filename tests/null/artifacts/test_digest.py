"""The identity of weight files: stable while nobody writes, gone or another one as soon as somebody does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.null.artifacts.gguf_for_tests import tiny_llama, write_gguf
from xllm.artifacts.digest import files_identity
from xllm.artifacts.gguf_file import GgufModel


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute after everything was written."""
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 60 * 10**9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "a.safetensors"
    made.write_bytes(bytes(range(256)) * 100)
    return made


def identity(path: Path) -> str:
    return files_identity([(path, path.stat())])


def test_an_untouched_file_keeps_its_identity(path: Path) -> None:
    assert identity(path) == identity(path) != ""


def test_a_copy_a_touched_and_a_changed_file_are_others(path: Path, tmp_path: Path) -> None:
    seen = {identity(path)}
    copy = tmp_path / "b.safetensors"
    copy.write_bytes(path.read_bytes())
    seen.add(identity(copy))
    os.utime(path, (1, 1))
    seen.add(identity(path))
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(12_345)
        file.write(b"\xff")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a forger's: the change time remains
    seen.add(identity(path))
    assert len(seen) == 4


def test_a_file_that_changed_after_it_was_opened_has_none(path: Path) -> None:
    opened = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    assert files_identity([(path, opened)]) == ""
    opened = path.stat()
    path.unlink()
    assert files_identity([(path, opened)]) == ""


def test_a_file_of_this_very_moment_has_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: path.stat().st_ctime_ns + 10**6)
    assert identity(path) == ""


def test_a_gguf_files_tensors_have_its_identity_and_can_be_read_after_release(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    tensors = GgufModel(path, "m").tensors()
    assert tensors.identity() == GgufModel(path, "other name").tensors().identity() != ""
    before = {name: tensors.load_f32(name).copy() for name in tensors.names()}
    tensors.release()
    for name, values in before.items():
        assert np.array_equal(tensors.load_f32(name), values)
    other = write_gguf(tmp_path / "n.gguf", tiny_llama())
    assert GgufModel(other, "m").tensors().identity() != tensors.identity()
    path.write_bytes(other.read_bytes())
    assert tensors.identity() == ""
