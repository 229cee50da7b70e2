"""Usage records in one SQLite file: WAL, one writer thread, batches, a bounded queue.

Each batch is one transaction that reaches the disk before the next begins (synchronous=FULL), so a crash of
the process or the machine loses at most what was pending: BATCH_S seconds of records. Nothing is ever
deleted or changed; who wants less keeps less. Several fronts of one machine may share a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from pathlib import Path

from xllm.errors import ConfigError, UnavailableError
from xllm.service.usage.record import MAX_PAGE, Totals, UsagePage, UsageQuery, UsageRecord
from xllm.service.usage.store import UsageCounts

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
BATCH_S = 0.25
MAX_BATCH = 512
MAX_PENDING = 16_384
"""About 10 MiB; at a thousand requests a second, a disk may fail for a quarter of a minute."""
BUSY_S = 2.0
RETRY_S = (0.25, 0.5, 1.0, 2.0, 5.0)
SAY_AGAIN_S = 60.0
CLOSE_S = 5.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    request_id TEXT PRIMARY KEY NOT NULL,
    client_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    num_attempts INTEGER NOT NULL,
    created_s REAL NOT NULL,
    duration_s REAL NOT NULL,
    front_id TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS usage_by_key ON usage (key_id, model, created_s);
"""

# OR IGNORE: a batch whose commit failed half-known is written again, and no request counts twice.
_INSERT = f"INSERT OR IGNORE INTO usage VALUES ({', '.join('?' * 13)})"

_TOTALS = """
SELECT key_id, model, COUNT(*), SUM(outcome NOT IN ('stop', 'length')),
       SUM(prompt_tokens), SUM(cached_tokens), SUM(completion_tokens)
FROM usage
WHERE created_s >= :since_s AND created_s < :until_s
  AND (:key_id IS NULL OR key_id = :key_id) AND (:model IS NULL OR model = :model)
  AND (:after_key IS NULL OR (key_id, model) > (:after_key, :after_model))
GROUP BY key_id, model ORDER BY key_id, model LIMIT :limit
"""


class SqliteUsageStore:
    """Make it with `open`. The writer thread alone holds a connection for writing."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._pending: deque[UsageRecord] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._num_written = 0
        self._num_lost = 0
        self._said_s = -SAY_AGAIN_S
        self._thread = threading.Thread(target=self._run, name="usage-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path) -> SqliteUsageStore:
        """Create or continue the file; only its owner may read it. Raises ConfigError."""
        try:
            # Before SQLite sees it, so that it is never readable to others; its side files copy the mode.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(fd, 0o600)
            finally:
                os.close(fd)
            return cls(path, _connect(path))
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"usage_db: cannot write {path}; it must be a database of usage records, or a new file in a "
                "directory that exists and may be written to",
                param="usage_db",
            ) from error

    def add(self, record: UsageRecord) -> None:
        with self._lock:
            if len(self._pending) >= MAX_PENDING:
                self._num_lost += 1
                return
            self._pending.append(record)
        self._wake.set()

    def counts(self) -> UsageCounts:
        with self._lock:
            return UsageCounts(self._num_written, len(self._pending), self._num_lost)

    async def totals(self, query: UsageQuery) -> UsagePage:
        try:
            return await asyncio.to_thread(_read_totals, self._path, query)
        except sqlite3.Error:
            log.warning("usage records cannot be read now", exc_info=True)
            raise UnavailableError("usage records cannot be read now", code="usage_unavailable") from None

    async def close(self) -> None:
        self._closing.set()
        self._wake.set()
        await asyncio.to_thread(self._thread.join, CLOSE_S)
        with self._lock:
            self._num_lost += len(self._pending)
            self._pending.clear()
        if self._num_lost:
            log.error("usage: %d records were lost in all", self._num_lost)

    # -- the writer thread ------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        try:
            while True:
                self._wake.wait()
                if not self._closing.is_set():
                    # Records of the next moments share the transaction.
                    self._closing.wait(BATCH_S)
                self._wake.clear()
                failures = 0 if self._write_all() else failures + 1
                if failures:
                    if self._closing.is_set():
                        return
                    self._closing.wait(RETRY_S[min(failures, len(RETRY_S)) - 1])
                    self._wake.set()
                elif self._closing.is_set():
                    return
        finally:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()

    def _write_all(self) -> bool:
        """Write what is pending, a batch at a time; False = the rest must wait."""
        while batch := self._next_batch():
            try:
                with self._connection:
                    self._connection.executemany(_INSERT, map(_row, batch))
            except sqlite3.Error as error:
                self._say(error)
                return False
            with self._lock:
                # Taken off only now: what is not on the disk counts as pending.
                for _ in batch:
                    self._pending.popleft()
                self._num_written += len(batch)
        return True

    def _next_batch(self) -> list[UsageRecord]:
        with self._lock:
            return [self._pending[i] for i in range(min(MAX_BATCH, len(self._pending)))]

    def _say(self, error: sqlite3.Error) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s >= SAY_AGAIN_S:
            self._said_s = now_s
            counts = self.counts()
            log.error(
                "usage records cannot be written (%s); serving goes on, %d wait, %d are lost",
                getattr(error, "sqlite_errorname", type(error).__name__),
                counts.num_pending,
                counts.num_lost,
            )


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"usage_db: {path} was written by a newer xLLM (schema {version}); use another file",
                param="usage_db",
            )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        if version == 0:
            (num_tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if num_tables:
                # Two fronts may begin at once; anything else in the file is not ours to touch.
                (known,) = connection.execute(
                    "SELECT COUNT(*) FROM sqlite_master WHERE name IN ('usage', 'usage_by_key')"
                ).fetchone()
                if not known:
                    raise sqlite3.DatabaseError("a database of something else")
            connection.executescript(_SCHEMA)
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection


def _row(record: UsageRecord) -> tuple[str | int | float, ...]:
    return (
        record.request_id,
        record.client_id,
        record.key_id,
        record.tenant,
        record.model,
        record.prompt_tokens,
        record.cached_tokens,
        record.completion_tokens,
        record.outcome,
        record.num_attempts,
        record.created_s,
        record.duration_s,
        record.front_id,
    )


def _read_totals(path: Path, query: UsageQuery) -> UsagePage:
    limit = max(1, min(query.limit, MAX_PAGE))
    after_key, after_model = query.after if query.after is not None else (None, None)
    values = {
        "since_s": float("-inf") if query.since_s is None else query.since_s,
        "until_s": float("inf") if query.until_s is None else query.until_s,
        "key_id": query.key_id,
        "model": query.model,
        "after_key": after_key,
        "after_model": after_model,
        "limit": limit + 1,
    }
    # A connection of its own: readers never wait for the writer in WAL, nor the writer for them.
    with contextlib.closing(
        sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)
    ) as reader:
        found = reader.execute(_TOTALS, values).fetchall()
    rows = tuple(
        Totals(
            key_id=key_id,
            model=model,
            num_requests=num,
            num_failed=failed,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=completion,
        )
        for key_id, model, num, failed, prompt, cached, completion in found
    )
    return UsagePage(rows=rows[:limit], more=len(rows) > limit)
