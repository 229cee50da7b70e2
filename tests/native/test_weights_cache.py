"""Packed weights kept on disk: the same bits from the file, and a start whatever becomes of the file."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.native.native_driver import library
from tests.reference.runner_driver import Driver
from tests.reference.test_bitwise import ARCHS, assert_same
from xllm.artifacts.source import DummySource
from xllm.config.schema import CacheConfig, EngineConfig, ModelConfig, PlatformConfig
from xllm.engine.kernels.native import weights_cache
from xllm.engine.kernels.native.handles import Matrix
from xllm.engine.kernels.native.isa import ISAS
from xllm.engine.kernels.native.packing import Packer, WeightClass
from xllm.engine.platform.base import BuiltRunner
from xllm.engine.platform.native import PLATFORM
from xllm.engine.sampling import Sampler
from xllm.errors import InternalError

pytestmark = pytest.mark.skipif(library() is None, reason="the native kernels are not built here")

TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 515, 90)]
ARCH = ARCHS["llama"]


class Named(DummySource):
    """Dummy weights that vouch for themselves, and count how often they are read."""

    def __init__(self, arch=ARCH, name: str = "weights-1") -> None:
        super().__init__(arch)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "read", [])

    __slots__ = ("name", "read")

    def identity(self) -> str:
        return self.name

    def load_f32(self, name: str):
        self.read.append(name)
        return super().load_f32(name)


def build(source: DummySource, folder: Path | str, quantize: str = "none") -> BuiltRunner:
    config = EngineConfig(
        model=ModelConfig(quantize=quantize, weights_cache=str(folder)),  # type: ignore[arg-type]
        cache=CacheConfig(num_pages=32),
        platform=PlatformConfig(platform="native", num_threads=2),
    )
    return PLATFORM.create_runner(source.config, source, config, 512, Sampler())


def logits(built: BuiltRunner) -> np.ndarray:
    driver = Driver(built.runner, 32)
    return driver.prefill(driver.new(TOKENS), 40).rows()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.packed"))


def cache_lines(built: BuiltRunner) -> str:
    return "\n".join(line for line in built.report if "weights_cache" in line or "packed weights" in line)


@pytest.mark.parametrize("quantize", ["none", "w8g32", "w4g32", "w8a8"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_mapped_weights_compute_the_same_bits(name: str, quantize: str, tmp_path: Path) -> None:
    arch = ARCHS[name]
    plain = build(DummySource(arch), "off", quantize)
    expected = logits(plain)
    assert "weights_cache=off" in cache_lines(plain)
    first, second = Named(arch), Named(arch)
    cold, warm = build(first, tmp_path / "c", quantize), build(second, tmp_path / "c", quantize)
    assert first.read
    assert second.read == []
    assert "mapped" in cache_lines(warm)
    assert_same(logits(cold), expected)
    assert_same(logits(warm), expected)
    assert warm.runner.numerics == plain.runner.numerics
    assert _packed_line(cold) == _packed_line(warm) == _packed_line(plain)


def _packed_line(built: BuiltRunner) -> str:
    (line,) = (line for line in built.report if line.startswith("packed weights: "))
    return line


def test_the_directory_and_its_files_are_the_users_alone(tmp_path: Path) -> None:
    build(Named(), tmp_path / "c")
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()] == [0o600, 0o600]


def test_other_weights_and_another_class_get_files_of_their_own(tmp_path: Path) -> None:
    for name, quantize in (("a", "none"), ("b", "none"), ("a", "w8g32"), ("a", "none")):
        build(Named(name=name), tmp_path, quantize)
    assert len(files(tmp_path)) == 3


def test_weights_that_nobody_vouches_for_are_not_kept(tmp_path: Path) -> None:
    built = build(DummySource(ARCH), tmp_path)
    assert "nothing vouches" in cache_lines(built)
    assert list(tmp_path.iterdir()) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [flip, lambda p: os.truncate(p, 5000), lambda p: p.write_bytes(b""), lambda p: p.chmod(0o666)],
    ids=["bit", "cut", "empty", "writable"],
)
def test_a_damaged_file_is_said_and_built_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    expected = logits(build(Named(), tmp_path))
    (path,) = files(tmp_path)
    damage(path)
    source = Named()
    built = build(source, tmp_path)
    assert source.read
    assert "are not used: " in cache_lines(built)
    assert_same(logits(built), expected)
    assert build(last := Named(), tmp_path)
    assert last.read == []


def test_a_name_that_cannot_be_replaced_costs_the_cache_only(tmp_path: Path) -> None:
    expected = logits(build(Named(), tmp_path))
    replace_by_folder(files(tmp_path)[0])
    built = build(Named(), tmp_path)
    assert "not kept" in cache_lines(built)
    assert_same(logits(built), expected)
    assert not list(tmp_path.glob(".*.part"))


def test_a_full_disk_costs_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    built = build(Named(), tmp_path)
    assert "not kept: No space left on device" in cache_lines(built)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setattr(weights_cache, "_SPARE_BYTES", 1 << 60)
    assert "of disk are free" in cache_lines(build(Named(), tmp_path))


def test_a_place_that_cannot_be_written_costs_the_cache_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "not kept: Not a directory" in cache_lines(build(Named(), tmp_path / "file" / "c"))
    assert "not kept: File exists" in cache_lines(build(Named(), tmp_path / "file"))


def test_a_directory_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "others may write" in cache_lines(build(Named(), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_change_while_they_are_read_are_not_kept(tmp_path: Path) -> None:
    class Changing(Named):
        def identity(self) -> str:
            return "after" if self.read else "before"

    assert "changed a moment ago" in cache_lines(build(Changing(), tmp_path))
    assert files(tmp_path) == []


def test_who_waits_for_the_lock_uses_what_the_other_made(tmp_path: Path) -> None:
    build(Named(), tmp_path)
    (path,) = files(tmp_path)
    aside = path.rename(tmp_path / "aside")
    fd = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    source, done = Named(), []
    thread = threading.Thread(target=lambda: done.append(build(source, tmp_path)))
    thread.start()
    aside.rename(path)
    os.close(fd)
    thread.join(60)
    assert "mapped" in cache_lines(done[0])
    assert source.read == []


def test_a_lock_that_is_never_given_back_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_cache, "_WAIT_S", 0.0)
    fd = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        assert "mapped" in cache_lines(build(Named(), tmp_path))
    finally:
        os.close(fd)


RACER = """
import dataclasses, hashlib, sys
from pathlib import Path
import msgspec
from xllm.arch import ArchConfig
from xllm.artifacts.source import DummySource
from xllm.config.schema import CacheConfig, EngineConfig, ModelConfig, PlatformConfig
from xllm.engine.platform.native import PLATFORM
from xllm.engine.sampling import Sampler

class Named(DummySource):
    def identity(self):
        return "weights-1"

source = Named(msgspec.json.decode(sys.stdin.readline(), type=ArchConfig))
model = ModelConfig(quantize="none", weights_cache=sys.argv[1])
platform = PlatformConfig(platform="native", num_threads=1)
config = EngineConfig(model=model, cache=CacheConfig(num_pages=32), platform=platform)
built = PLATFORM.create_runner(source.config, source, config, 512, Sampler())
assert any("mapped" in line for line in built.report), built.report
print("done")
"""


def test_processes_that_start_together_all_end_well(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path / "c")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) for _ in range(3)
    ]
    arch = msgspec.json.encode(ARCH) + b"\n"
    assert [racer.communicate(arch, timeout=60)[0] for racer in racers] == [b"done\n"] * 3
    assert len(files(tmp_path / "c")) == 1
    assert not list((tmp_path / "c").glob(".*.part"))
    source = Named()
    assert_same(logits(build(source, tmp_path / "c")), logits(build(DummySource(ARCH), "off")))
    assert source.read == []


def test_the_longest_unused_files_go_first_and_strangers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate("abc"):
        before = set(files(tmp_path))
        build(Named(name=name), tmp_path)
        (made,) = set(files(tmp_path)) - before
        os.utime(made, (i, i))
    build(Named(name="a"), tmp_path)  # used: now the youngest
    oldest = min(files(tmp_path), key=lambda p: p.stat().st_mtime)
    strangers = [tmp_path / "notes.packed", tmp_path / "model.gguf"]
    part = tmp_path / f".{'0' * 32}.{'1' * 16}.part"
    for path in (*strangers, part):
        path.write_bytes(bytes(1 << 16))
        os.utime(path, (0, 0))
    monkeypatch.setattr(weights_cache, "MAX_BYTES", int(3.5 * oldest.stat().st_size))
    built = build(Named(name="d"), tmp_path)
    assert "used longest ago" in cache_lines(built)
    assert len(files(tmp_path)) == 3 + 1  # with the stranger of that ending
    assert not oldest.exists()
    assert not part.exists()
    assert all(path.exists() for path in strangers)


def rows_of(kernels, matrix: Matrix) -> np.ndarray:
    ids = np.arange(matrix.num_out, dtype=np.int64)
    rows = np.zeros((matrix.num_out, matrix.num_in), dtype=np.float32)
    arguments = (matrix.ptr, ids.ctypes.data, len(ids), rows.ctypes.data, matrix.num_in)
    assert kernels.xn_matrix_rows(*arguments) == 0
    return rows


@pytest.mark.parametrize("isa", [i.name for i in ISAS])
@pytest.mark.parametrize("weight_class", ["bf16", "w8g32", "w4g32", "w8a8"])
def test_a_record_that_no_packer_makes_is_refused(weight_class: WeightClass, isa: str) -> None:
    kernels = library(isa)
    if kernels is None:
        pytest.skip(f"the {isa} kernels are not built, or this CPU cannot run them")
    packer = Packer(kernels, None)
    values = np.random.default_rng(0).standard_normal((40, 64), dtype=np.float32)
    matrix = packer.values(values, weight_class)
    record, panels = packer.stored(matrix)
    assert_same(rows_of(kernels, packer.over(record, panels, (40, 64))), rows_of(kernels, matrix))
    refused = 0
    for at in range(len(record)):
        bad = bytearray(record)
        bad[at] ^= 0x11
        try:
            found = packer.over(bytes(bad), panels, (40, 64))
        except InternalError:
            refused += 1
        else:  # padding, or a number that is no offset: every row can still be read
            assert np.isfinite(rows_of(kernels, found)).all()
    assert refused > len(record) // 2
    for wrong in (b"", record[:-1], record + b"\0"):
        with pytest.raises(InternalError):
            packer.over(wrong, panels, (40, 64))
    with pytest.raises(InternalError):
        packer.over(record, panels[:-64], (40, 64))
    with pytest.raises(InternalError):
        packer.over(record, panels, (40, 32))
