"""Log lines: one event is one line, whatever is in it."""

from __future__ import annotations

import io
import json
import logging

import pytest

from tests.null.api.conftest import MakeSite
from xllm.observability.logs import JsonFormatter, LineFormatter


@pytest.mark.parametrize("formatter", [LineFormatter(), JsonFormatter()])
def test_nothing_can_forge_a_line(formatter: logging.Formatter) -> None:
    record = logging.LogRecord(
        "xllm.x", logging.INFO, "", 0, "name=%s", ("a\nINFO forged\r\x1b[2J\u2028",), None
    )
    line = formatter.format(record)
    assert line.isprintable()
    assert "forged" in line


def test_json_lines_have_the_four_fields() -> None:
    record = logging.LogRecord("xllm.x", logging.WARNING, "", 0, "a=%d", (1,), None)
    value = json.loads(JsonFormatter().format(record))
    assert {k: value[k] for k in ("level", "logger", "message")} == {
        "level": "warning",
        "logger": "xllm.x",
        "message": "a=1",
    }
    assert value["ts"] == pytest.approx(record.created, abs=0.001)


async def test_neither_prompts_nor_keys_are_logged(make_site: MakeSite) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger("xllm")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        site = await make_site(api_key=("key-hunter2",))
        headers = {"authorization": "Bearer key-hunter2"}
        for path in ("/v1/completions", "/hunter2"):
            await site.client.post(path, json={"prompt": "hunter2", "user": "hunter2"}, headers=headers)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert "route=/v1/completions status=200" in stream.getvalue()
    assert "hunter2" not in stream.getvalue()
