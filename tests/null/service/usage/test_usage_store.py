"""Usage records in SQLite: once each, private, and never in the way of serving."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from xllm.errors import ConfigError
from xllm.service.usage import UsageQuery, UsageRecord
from xllm.service.usage import sqlite as usage_sqlite
from xllm.service.usage.open import open_usage_store
from xllm.service.usage.sqlite import SqliteUsageStore


def record(request_id: str, **fields: object) -> UsageRecord:
    given: dict[str, object] = {
        "client_id": "c",
        "key_id": "k1",
        "tenant": "k1",
        "model": "m",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 3,
        "outcome": "stop",
        "num_attempts": 1,
        "created_s": 100.0,
        "duration_s": 0.5,
        "front_id": "f",
        **fields,
    }
    return UsageRecord(request_id=request_id, **given)  # type: ignore[arg-type]


@pytest.fixture
async def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqliteUsageStore]:
    monkeypatch.setattr(usage_sqlite, "BUSY_S", 0.05)
    monkeypatch.setattr(usage_sqlite, "RETRY_S", (0.01,))
    monkeypatch.setattr(usage_sqlite, "BATCH_S", 0.01)
    made = SqliteUsageStore.open(tmp_path / "usage.db")
    yield made
    await made.close()


async def until(holds: Callable[[], bool]) -> None:
    """Poll a condition of another thread; the test's own time limit ends it."""
    while not holds():
        await asyncio.sleep(0.005)


def rows(store: SqliteUsageStore) -> list[tuple[object, ...]]:
    with sqlite3.connect(store._path) as reader:
        found = reader.execute("SELECT * FROM usage ORDER BY request_id").fetchall()
    reader.close()
    return found


async def test_every_field_of_a_record_is_kept(store: SqliteUsageStore) -> None:
    store.add(record("r", client_id="mine", outcome="deadline_exceeded", num_attempts=3, duration_s=1.5))
    await until(lambda: store.counts().num_written == 1)
    assert rows(store) == [
        ("r", "mine", "k1", "k1", "m", 10, 4, 3, "deadline_exceeded", 3, 100.0, 1.5, "f"),
    ]


async def test_a_request_counts_once_however_often_it_is_written(store: SqliteUsageStore) -> None:
    for _ in range(3):
        store.add(record("same"))
    store.add(record("other"))
    await until(lambda: store.counts().num_pending == 0)
    assert [r[0] for r in rows(store)] == ["other", "same"]


async def test_only_the_owner_may_read_the_file_and_its_side_files(store: SqliteUsageStore) -> None:
    store.add(record("r"))
    await until(lambda: store.counts().num_written == 1)
    files = sorted(store._path.parent.iterdir())
    assert [f.name for f in files] == ["usage.db", "usage.db-shm", "usage.db-wal"]
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}


async def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "open.db"
    path.touch(0o644)
    await open_usage_store(str(path)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_totals_by_key_and_model_in_pages(store: SqliteUsageStore) -> None:
    for n in range(30):
        store.add(
            record(
                f"r{n:02d}",
                key_id=f"k{n % 3}",
                model="m" if n < 15 else "n",
                created_s=float(n),
                outcome="stop" if n % 2 else "aborted",
            )
        )
    await until(lambda: store.counts().num_pending == 0)
    whole = await store.totals(UsageQuery())
    assert [(t.key_id, t.model, t.num_requests, t.prompt_tokens) for t in whole.rows] == [
        (f"k{k}", m, 5, 50) for k in range(3) for m in "mn"
    ]
    assert sum(t.num_failed for t in whole.rows) == 15
    assert not whole.more
    paged, after = [], None
    while True:
        page = await store.totals(UsageQuery(limit=2, after=after))
        paged += page.rows
        if not page.more:
            break
        after = (page.rows[-1].key_id, page.rows[-1].model)
    assert tuple(paged) == whole.rows
    some = await store.totals(UsageQuery(since_s=10.0, until_s=20.0, key_id="k1", model="m"))
    assert [(t.key_id, t.num_requests) for t in some.rows] == [("k1", 2)]  # 10 and 13


async def test_a_store_is_continued_and_several_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    one, two = SqliteUsageStore.open(path), SqliteUsageStore.open(path)
    for n in range(50):
        (one, two)[n % 2].add(record(f"r{n}"))
    await asyncio.gather(one.close(), two.close())
    assert one.counts().num_written + two.counts().num_written == 50
    again = SqliteUsageStore.open(path)
    (total,) = (await again.totals(UsageQuery())).rows
    assert total.num_requests == 50
    await again.close()


async def test_a_locked_database_delays_records_and_loses_none(
    store: SqliteUsageStore, caplog: pytest.LogCaptureFixture
) -> None:
    other = sqlite3.connect(store._path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for n in range(20):
        store.add(record(f"r{n}"))
    await until(lambda: "cannot be written" in caplog.text)  # the fault has happened
    assert store.counts().num_written == 0
    assert store.counts().num_pending == 20
    other.execute("ROLLBACK")
    other.close()
    await until(lambda: store.counts().num_written == 20)
    assert store.counts().num_lost == 0
    assert caplog.text.count("cannot be written") == 1


async def test_a_full_disk_never_blocks_or_grows_and_what_is_lost_is_counted(
    store: SqliteUsageStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(usage_sqlite, "MAX_PENDING", 100)
    store._connection.execute("PRAGMA max_page_count = 1")
    big = "x" * 4000
    for n in range(300):
        store.add(record(f"r{n:03d}", client_id=big))
    await until(lambda: "SQLITE_FULL" in caplog.text)
    counts = store.counts()
    assert counts.num_pending <= 100
    assert counts.num_lost >= 100
    # Room again: what was kept is written, what was lost stays counted.
    store._connection.execute("PRAGMA max_page_count = 1000000")
    await until(lambda: store.counts().num_pending == 0)
    assert store.counts().num_written + store.counts().num_lost == 300
    assert len(rows(store)) == store.counts().num_written


async def test_closing_writes_what_is_pending_and_gives_up_on_a_dead_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(usage_sqlite, "BUSY_S", 0.05)
    good = SqliteUsageStore.open(tmp_path / "good.db")
    good.add(record("r"))
    await good.close()
    assert good.counts().num_written == 1
    locked = SqliteUsageStore.open(tmp_path / "locked.db")
    other = sqlite3.connect(tmp_path / "locked.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    locked.add(record("r"))
    await locked.close()
    other.close()
    assert locked.counts().num_lost == 1
    assert "1 records were lost" in caplog.text
    assert not any(t.name == "usage-writer" for t in threading.enumerate())


KILLED = """
import sys, time
from pathlib import Path
from tests.null.service.usage.test_usage_store import record
from xllm.service.usage.sqlite import SqliteUsageStore
store = SqliteUsageStore.open(Path(sys.argv[1]))
for n in range(10**9):
    store.add(record(f"r{n:09d}"))
    if n % 50 == 0:
        print(store.counts().num_written, flush=True)
        time.sleep(0.002)
"""


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as child:
        assert child.stdout is not None
        num_written = 0
        while num_written < 500:
            num_written = int(child.stdout.readline())
        child.kill()
    with sqlite3.connect(path) as reader:
        (num_rows,) = reader.execute("SELECT COUNT(*) FROM usage").fetchone()
        (verdict,) = reader.execute("PRAGMA integrity_check").fetchone()
    reader.close()
    assert num_rows >= num_written >= 500
    assert verdict == "ok"


@pytest.mark.parametrize("case", ["missing directory", "no database", "newer", "something else", "link"])
def test_a_file_that_cannot_serve_is_refused_at_the_start(tmp_path: Path, case: str) -> None:
    path = tmp_path / "usage.db"
    if case == "missing directory":
        path = tmp_path / "none" / "usage.db"
    elif case == "no database":
        path.write_bytes(b"no database at all" * 100)
    elif case == "link":
        (tmp_path / "target").touch()
        path.symlink_to(tmp_path / "target")
    else:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE notes (text)")
            other.execute(f"PRAGMA user_version = {99 if case == 'newer' else 0}")
        other.close()
    with pytest.raises(ConfigError, match="usage_db") as caught:
        open_usage_store(str(path))
    assert caught.value.param == "usage_db"
