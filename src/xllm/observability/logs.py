"""Logging for the processes of a service: one line per event, key=value or JSON, never in anybody's way.

Prompts, outputs and keys are never passed to a logger; callers log ids, names, counts and times.
Control characters are escaped, so that nothing can forge a line.
"""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import re
import sys
import threading
from typing import TextIO

MAX_WAITING_LINES = 4096
FLUSH_S = 0.5
"""What is still unwritten at the end of the process may take this long."""

_PLAIN = re.compile(r"[^\s\"'=\x00-\x1f]+")


def log_event(logger: logging.Logger, event: str, /, **facts: object) -> None:
    """One structured line at info: `event name=value …`, or a JSON object with the names as members."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(Event(event, facts))


class Event:
    """A log message that is an event with facts; anybody's formatter shows it as text."""

    __slots__ = ("facts", "name")

    def __init__(self, name: str, facts: dict[str, object]) -> None:
        self.name, self.facts = name, facts

    def __str__(self) -> str:
        return self.name + "".join(f" {name}={_shown(value)}" for name, value in self.facts.items())


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00 INFO xllm.api: text`, always one line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).encode("unicode_escape").decode("ascii")


class JsonFormatter(logging.Formatter):
    """{"ts", "level", "logger", "message"} per line, then the facts of the event."""

    def format(self, record: logging.LogRecord) -> str:
        event = record.msg if isinstance(record.msg, Event) else None
        value: dict[str, object] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage() if event is None else event.name,
        }
        if record.exc_info:
            value["traceback"] = self.formatException(record.exc_info)
        # The names above are the line's own: no fact can replace them.
        return json.dumps({**value, **(event.facts if event else {}), **value}, default=str)


class BoundedHandler(logging.Handler):
    """Lines go to a thread that writes them; when the sink blocks, they are dropped and counted.

    Nothing that serves ever waits for a log. The thread writes to the file descriptor itself and is a
    daemon: a reader that has stopped cannot keep the process from ending either.
    """

    def __init__(self, stream: TextIO, max_lines: int = MAX_WAITING_LINES) -> None:
        super().__init__()
        self.num_dropped = 0
        self._stream = stream
        self._fd = _descriptor(stream)
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        self._thread: threading.Thread | None = None
        self._num_told = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._put(self.format(record))
        except Exception:  # noqa: BLE001  as logging does: a line that cannot be made must not cost a request
            self.handleError(record)

    def say(self, line: str) -> None:
        """A line as it is, between the log's; within a log of objects it becomes one."""
        if isinstance(self.formatter, JsonFormatter):
            line = self.format(logging.LogRecord("xllm.say", logging.INFO, "", 0, "%s", (line,), None))
        with self.lock or threading.Lock():
            self._put(line)

    def _put(self, line: str) -> None:
        # Called with the handler's lock. Started here, after any fork and any binding to CPUs.
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="xllm-log", daemon=True)
            self._thread.start()
        try:
            self._lines.put_nowait(line + "\n")
        except queue.Full:
            self.num_dropped += 1

    def flush(self) -> None:
        """Wait for what is queued, but not for a sink that blocks."""
        if self._thread is None or not self._thread.is_alive():
            return
        try:
            self._lines.put(None, timeout=FLUSH_S)
        except queue.Full:
            return
        self._thread.join(FLUSH_S)
        if not self._thread.is_alive():
            self._thread = None

    def close(self) -> None:
        self.flush()
        super().close()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            missing = self.num_dropped - self._num_told
            if missing:
                self._num_told += missing
                record = logging.LogRecord(
                    "xllm.log", logging.WARNING, "", 0, "%d lines were dropped", (missing,), None
                )
                self._write(self.format(record) + "\n")
            self._write(line)

    def _write(self, line: str) -> None:
        try:
            if self._fd is None:
                self._stream.write(line)
                self._stream.flush()
                return
            data = line.encode("utf-8", "backslashreplace")
            while data:
                data = data[os.write(self._fd, data) :]
        except (OSError, ValueError):
            self.num_dropped += 1  # closed, or the disk is full: this line is lost, the next may not be


def say(line: str) -> None:
    """Tell whoever started this process. Goes the way of the log once that is set up: nobody waits for it."""
    handlers = _handlers()
    for handler in handlers:
        handler.say(line)
    if not handlers:
        print(line, file=sys.stderr, flush=True)


def flush_logs() -> None:
    """Before something is printed that must come after them. Waits for a sink that blocks only so long."""
    for handler in _handlers():
        handler.flush()


def num_dropped_lines() -> int:
    """Of this process, since its logging was set up."""
    return sum(handler.num_dropped for handler in _handlers())


def setup_logging(
    level: str = "info", *, as_json: bool = False, stream: TextIO | None = None
) -> BoundedHandler:
    """Send the `xllm` loggers to `stream` (stderr). Other libraries' loggers are left alone."""
    handler = BoundedHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else LineFormatter())
    root = logging.getLogger("xllm")
    root.handlers = [handler]
    root.setLevel(level.upper())
    root.propagate = False
    return handler


def _handlers() -> list[BoundedHandler]:
    return [h for h in logging.getLogger("xllm").handlers if isinstance(h, BoundedHandler)]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, io.UnsupportedOperation):
        return None
