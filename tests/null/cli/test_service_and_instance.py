"""`xllm service` and `xllm instance` as processes: keys, refusals in one line, draining; no registry."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.faultlab.lab import environment, flags
from xllm.cli.main import main
from xllm.testing.server_process import ServerProcess

KEY = "correct horse battery staple"


def wait_for(done: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def said(process: ServerProcess, text: str) -> bool:
    return any(text in line for line in tuple(process.lines))


def key_file(folder: Path, key: str) -> str:
    path = folder / f"key-{len(key)}"
    path.write_text(key)
    path.chmod(0o600)
    return str(path)


def test_the_key_opens_and_another_one_does_not(tmp_path: Path) -> None:
    env = environment(pace_ms=5)
    right, wrong = key_file(tmp_path, KEY), key_file(tmp_path, KEY + " not")
    instance = ServerProcess([*flags(tmp_path), "--cluster-key-file", right], env, command="instance")
    running = [instance]
    try:
        instance.wait_ready(60)
        registry = ("--registry", f"static://{instance.base_url}", "--cluster-key-file")
        ours = ServerProcess([*registry, right], env, command="service")
        theirs = ServerProcess([*registry, wrong], env, command="service")
        running += [ours, theirs]
        ours.wait_ready(60)
        theirs.wait_ready(60)
        wait_for(lambda: said(ours, "is connected") and said(theirs, "cannot be used"))
        ready = [httpx.get(f"{s.base_url}/ready", timeout=10).status_code for s in (ours, theirs)]
        assert ready == [200, 503]
        assert said(theirs, "cluster_key")
        body = {"model": "lab", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{ours.base_url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            instance.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "the answer that ran was cut off"
        assert instance.process.wait(20) == 0
        assert said(instance, "draining")
        assert ours.stop() == 0
        assert not any(KEY in line for process in running for line in process.lines)
    finally:
        for process in running:
            process.process.kill()
            process.stop()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["service"], "registry=embedded is for one process"),
        (["service", "--registry", "etcd:/a"], "is no registry"),
        (["service", "--registry", "static://a"], "an address is host:port"),
        (["instance", "m", "--registry", "static://a:1"], "registry=static"),
        (["instance", "m", "--listen", "0.0.0.0:0"], "set cluster_key_file"),
        (["instance"], "name a model"),
    ],
)
def test_what_cannot_work_is_one_line_with_its_remedy(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[-1]
    assert lines[-1].startswith(f"xllm {words[0]}: ")


def test_an_odd_name_is_refused_before_loading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLLM_INSTANCE_ID", "../../etc")
    assert main(["instance", "m"]) == 2
    assert "is no name" in capsys.readouterr().err
