"""Roles on the command line: `serve --instances prefill:1,decode:1` and an instance that says its role."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.faultlab.lab import environment, flags
from xllm.testing.server_process import ServerProcess


def roles(server: ServerProcess) -> dict[str, Any]:
    shown = httpx.get(f"{server.base_url}/v1/role", timeout=30).json()["instances"]
    return {i["instance"]: i for i in shown}


def wait_for(done: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def test_serve_starts_engines_in_their_roles_and_switches_them_while_they_serve(tmp_path: Path) -> None:
    server = ServerProcess([*flags(tmp_path), "--instances", "prefill:1,decode:1"], environment(pace_ms=2))
    try:
        server.wait_ready(60)
        wait_for(lambda: len(roles(server)) == 2)
        assert [i["role"] for i in roles(server).values()] == ["prefill", "decode"]
        assert httpx.get(f"{server.base_url}/ready", timeout=30).status_code == 200
        body = {"model": "lab", "prompt": "x", "max_tokens": 40, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            epoch = roles(server)["engine-1"]["epoch"]
            switch = {"instance": "engine-1", "role": "mixed", "epoch": epoch}
            reply = httpx.post(f"{server.base_url}/v1/role", json=switch, timeout=30)
            assert reply.status_code == 200, reply.text
            assert httpx.post(f"{server.base_url}/v1/role", json=switch, timeout=30).status_code == 409
            said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert said[-1]["choices"][0]["finish_reason"] == "length"
        assert roles(server)["engine-1"]["reason"] == "operator"
        assert server.metric("xllm:pool_size") == 2
    finally:
        server.stop()


def test_an_instance_tells_fronts_the_role_that_it_was_started_in(tmp_path: Path) -> None:
    env = environment(pace_ms=2)
    parts = [
        ServerProcess(flags(tmp_path), {**env, "XLLM_ROLE": role}, command="instance")
        for role in ("decode", "prefill")
    ]
    try:
        for part in parts:
            part.wait_ready(60)
        registry = "static://" + ",".join(part.base_url for part in parts)
        service = ServerProcess(["--registry", registry], env, command="service")
        parts.append(service)
        service.wait_ready(60)
        wait_for(lambda: len(roles(service)) == 2)
        assert sorted(i["role"] for i in roles(service).values()) == ["decode", "prefill"]
    finally:
        for part in parts:
            part.process.kill()
            part.stop()
