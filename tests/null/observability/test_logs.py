"""The log sink: it may block, break or lag, and nobody who logs ever waits for it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from xllm.observability.logs import BoundedHandler, JsonFormatter, LineFormatter, log_event


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    made = logging.getLogger("xllm.test-of-logs")
    made.propagate = False
    made.setLevel(logging.INFO)
    yield made
    for handler in tuple(made.handlers):
        made.removeHandler(handler)
        handler.close()


def attach(
    logger: logging.Logger, stream: object, formatter: logging.Formatter, **how: int
) -> BoundedHandler:
    handler = BoundedHandler(stream, **how)  # type: ignore[arg-type]
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    return handler


def test_an_event_is_a_line_of_pairs_or_an_object(logger: logging.Logger) -> None:
    text, objects = io.StringIO(), io.StringIO()
    handlers = [attach(logger, text, LineFormatter()), attach(logger, objects, JsonFormatter())]
    log_event(logger, "place", request="r1", score=0.25, why="a b", level="forged", n=3)
    for handler in handlers:
        handler.flush()
    assert (
        text.getvalue()
        .rstrip()
        .endswith('xllm.test-of-logs: place request=r1 score=0.25 why="a b" level=forged n=3')
    )
    value = json.loads(objects.getvalue())
    assert value["message"] == "place"
    assert (value["request"], value["score"], value["n"]) == ("r1", 0.25, 3)
    assert value["level"] == "info", "a fact must not replace what the line says of itself"


def test_a_traceback_stays_within_its_line(logger: logging.Logger) -> None:
    out = io.StringIO()
    handler = attach(logger, out, JsonFormatter())
    try:
        raise ValueError("a\nb")
    except ValueError:
        logger.exception("it failed")
    handler.flush()
    (line,) = out.getvalue().splitlines()
    assert "ValueError" in json.loads(line)["traceback"]


def test_lines_keep_their_order_and_none_is_lost_while_the_sink_takes_them(logger: logging.Logger) -> None:
    out = io.StringIO()
    handler = attach(logger, out, LineFormatter())
    for i in range(1000):
        logger.info("line %d", i)
    handler.flush()
    assert [line.rsplit(" ", 1)[1] for line in out.getvalue().splitlines()] == [str(i) for i in range(1000)]
    logger.info("after a flush")
    handler.flush()
    assert out.getvalue().endswith("after a flush\n")


def test_a_blocked_sink_costs_lines_and_never_the_caller(logger: logging.Logger) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as source, os.fdopen(writer, "w") as sink:
        handler = attach(logger, sink, LineFormatter(), max_lines=8)
        line = "x" * 20_000
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(writer, b"." * 4096):
                continue
        os.set_blocking(writer, True)
        logger.info(line)
        while not handler._lines.empty():
            time.sleep(0)  # the writing thread takes it, and then stands before a full pipe
        for _ in range(8 + 100):
            logger.info(line)
        assert handler.num_dropped == 100
        received: list[bytes] = []
        drain = threading.Thread(target=lambda: received.extend(iter(source.readline, b"")), daemon=True)
        drain.start()
        while b"were dropped" not in b"".join(received):
            logger.info("again")
        handler.flush()
        sink.close()
        drain.join(10)
    told = [line for line in received if b"were dropped" in line]
    assert b"xllm.log" in told[0]


def test_a_full_disk_loses_lines_and_counts_them(logger: logging.Logger) -> None:
    with open("/dev/full", "w") as full:
        handler = attach(logger, full, LineFormatter())
        logger.info("lost")
        handler.flush()
        assert handler.num_dropped == 1


def test_a_process_whose_sink_blocks_still_ends() -> None:
    program = (
        "import logging; from xllm.observability.logs import setup_logging\n"
        "handler = setup_logging()\n"
        "while not handler.num_dropped: logging.getLogger('xllm.a').info('x' * 200)\n"
        "print('blocked', flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocked\n"
        # Nobody has read its stderr up to here.
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
