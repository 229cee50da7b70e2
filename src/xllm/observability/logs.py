"""Logging for the processes of a service: one line per event, key=value or JSON.

Prompts, outputs and keys are never passed to a logger; callers log ids, names, counts and times.
Control characters are escaped, so that nothing can forge a line.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import TextIO


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00 INFO xllm.api: text`, always one line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).encode("unicode_escape").decode("ascii")


class JsonFormatter(logging.Formatter):
    """{"ts", "level", "logger", "message"} per line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "ts": round(record.created, 3),
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": record.getMessage(),
            }
        )


def setup_logging(level: str = "info", *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Send the `xllm` loggers to `stream` (stderr). Other libraries' loggers are left alone."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else LineFormatter())
    root = logging.getLogger("xllm")
    root.handlers = [handler]
    root.setLevel(level.upper())
    root.propagate = False
