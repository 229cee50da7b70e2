"""What a server tells on stderr: nobody need read it, and as JSON every line is an object."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import httpx
import pytest

from tests.null.cli.test_serve_process import CONFIG
from xllm.artifacts.write import write_hf_dir
from xllm.testing.tiny_tokenizer import tiny_assets

SERVE = (sys.executable, "-m", "xllm.cli.main", "serve")
PIPE_BYTES = 4096


def unread(fd: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_hf_dir(directory, CONFIG, {}, tiny_assets(512))
    return directory


def test_a_full_pipe_neither_stops_serving_nor_the_end(model: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    command = [
        sys.executable,
        "-m",
        "xllm.cli.main",
        "serve",
        str(model),
        "--platform",
        "null",
        "--port",
        "0",
    ]
    process = subprocess.Popen([*command, "--served-model-name", "tiny"], stderr=writer)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb", buffering=0) as told:
            text = b""
            while b"\nready: " not in text or not text.endswith(b"\n"):
                text += told.read(1)  # bytewise: what comes later stays in the pipe
            url = text.rsplit(b"ready: ", 1)[1].decode().strip()
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                while unread(told.fileno()) < PIPE_BYTES - 1024:
                    assert client.post("/v1/completions", json=body).status_code == 200
                # Each of these logs two lines, for which there is no room any more.
                for _ in range(20):
                    assert client.post("/v1/completions", json=body).status_code == 200
            assert unread(told.fileno()) <= PIPE_BYTES
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_with_log_format_json_every_line_is_an_object(model: Path) -> None:
    env = {**os.environ, "XLLM_LOG_FORMAT": "json"}
    process = subprocess.Popen(
        [*SERVE, str(model), "--platform", "null", "--port", "0"], stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(json.loads(line))
            if lines[-1]["message"].startswith("ready: "):
                url = lines[-1]["message"].removeprefix("ready: ")
                body = {"prompt": "hello", "max_tokens": 2}
                headers = {"x-request-id": "mine"}
                httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    (place,) = [line for line in lines if line["logger"] == "xllm.decisions" and line["message"] == "place"]
    (access,) = [line for line in lines if line["logger"] == "xllm.access"]
    assert place["client"] == access["request_id"] == "mine"
    assert place["request"] == access["serves"]
    assert access["status"] == 200
