"""The file of packed weights: what is written comes back, and nothing that is not whole is ever used."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash

from xllm.engine.kernels.native import packed_file
from xllm.engine.kernels.native.packed_file import Item, PackedFile, PackedFileError, write_packed

KEY = "0123456789abcdef" * 2
_TABLE_AT = 56


def items(num_bytes: int = 5000) -> list[Item]:
    rng = np.random.default_rng(0)
    return [
        Item(name=f"{i}.qkv", shape=(size // 10, 10), record=bytes([i]) * 7, content=rng.bytes(size))
        for i, size in enumerate((640, num_bytes, 70))
    ]


def made(items: list[Item]) -> list[Item]:
    return [msgspec.structs.replace(i, content=np.frombuffer(i.content, dtype=np.uint8)) for i in items]


def written(path: Path, what: list[Item] | None = None) -> Path:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        write_packed(fd, KEY, made(items() if what is None else what))
    finally:
        os.close(fd)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "x.packed")


def damaged(path: Path, at: int) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)
    return path


def with_table(path: Path, **changes: object) -> Path:
    """The file with another table under a right checksum: what a forger, or a bug of ours, would make."""
    data = bytearray(path.read_bytes())
    head = list(struct.unpack_from("<8sIIQ16s16s", data))
    table = msgspec.msgpack.decode(bytes(data[_TABLE_AT : _TABLE_AT + head[2]]))
    table["entries"][1] |= changes
    encoded = msgspec.msgpack.encode(table)
    head[2], head[4] = len(encoded), xxhash.xxh3_128_digest(encoded)
    data[:_TABLE_AT] = struct.pack("<8sIIQ16s16s", *head)
    data[_TABLE_AT : _TABLE_AT + len(encoded)] = encoded
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("num_bytes", [5000, (8 << 20) - 4096 - 640, 17 << 20])
def test_what_was_written_comes_back(tmp_path: Path, num_bytes: int) -> None:
    wanted = items(num_bytes)
    file = PackedFile(written(tmp_path / "x", wanted), KEY)
    assert file.num_bytes == (tmp_path / "x").stat().st_size
    for item, entry in zip(wanted, file.entries, strict=True):
        content = file.content(entry)
        assert (entry.name, entry.shape, entry.record) == (item.name, item.shape, item.record)
        assert content.tobytes() == item.content
        assert content.ctypes.data % 64 == 0
        assert not content.flags.writeable


def test_content_outlives_the_file_and_its_name(path: Path) -> None:
    file = PackedFile(path, KEY)
    content = file.content(file.entries[0])
    del file
    path.unlink()
    assert content.tobytes() == items()[0].content


def test_a_missing_file_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PackedFile(tmp_path / "none", KEY)


def test_another_key_is_refused(path: Path) -> None:
    with pytest.raises(PackedFileError, match="other weights"):
        PackedFile(path, KEY[::-1])


@pytest.mark.parametrize("length", [0, 10, 56, 4096, 9000])
def test_a_cut_file_is_refused(path: Path, length: int) -> None:
    os.truncate(path, length)
    with pytest.raises(PackedFileError, match="cut off"):
        PackedFile(path, KEY)


def test_a_longer_file_is_refused(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PackedFileError, match="cut off"):
        PackedFile(path, KEY)


def test_one_flipped_bit_anywhere_that_counts_is_noticed(path: Path) -> None:
    table_end = _TABLE_AT + struct.unpack_from("<I", path.read_bytes(), 12)[0]
    places = [*range(0, _TABLE_AT), *range(_TABLE_AT, table_end, 11), *range(4096, path.stat().st_size, 97)]
    for at in places:
        damaged(path, at)
        with pytest.raises(PackedFileError):
            PackedFile(path, KEY)
        damaged(path, at)
    PackedFile(path, KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1 << 40},
        {"offset": -64},
        {"offset": 0},
        {"offset": 4096 + 1},
        {"num_bytes": 1 << 50},
        {"num_bytes": 0},
        {"num_bytes": -1},
        {"offset": "4096"},
        {"shape": "ab"},
        {"record": 5},
        {"offset": 4096},
    ],
)
def test_a_table_that_points_outside_or_overlaps_is_refused(path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(PackedFileError, match="table"):
        PackedFile(with_table(path, **changes), KEY)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(PackedFileError, match="somebody else"):
        PackedFile(path, KEY)


def test_a_file_of_somebody_else_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PackedFileError, match="somebody else"):
        PackedFile(path, KEY)


def test_a_link_a_directory_and_a_pipe_are_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("link", "folder", "pipe"):
        with pytest.raises(PackedFileError):
            PackedFile(tmp_path / name, KEY)


def test_a_file_without_entries_is_whole(tmp_path: Path) -> None:
    assert PackedFile(written(tmp_path / "x", []), KEY).entries == ()


def test_writing_in_pieces_keeps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "_CHUNK", 1000)
    file = PackedFile(written(tmp_path / "x"), KEY)
    assert [file.content(e).tobytes() for e in file.entries] == [i.content for i in items()]
