"""`xllm serve` with a certificate and a usage file: both in place, and a new certificate after SIGHUP."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.null.api.test_tls import make_pair
from tests.null.cli.test_serve_process import CONFIG
from xllm.artifacts.write import write_hf_dir
from xllm.testing.server_process import ServerProcess
from xllm.testing.tiny_tokenizer import tiny_assets

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


def until(holds: Callable[[], bool]) -> None:
    """Poll another process; the test's own time limit ends it."""
    while not holds():
        time.sleep(0.02)


def trusts(url: str, context: ssl.SSLContext) -> bool:
    try:
        return httpx.get(f"{url}/health", verify=context, trust_env=False).status_code == 200
    except httpx.ConnectError:
        return False


def test_tls_usage_and_a_new_certificate(tmp_path: Path) -> None:
    model, usage = tmp_path / "tiny", tmp_path / "usage.db"
    write_hf_dir(model, CONFIG, {}, tiny_assets(512))
    old, new = make_pair(tmp_path, "old"), make_pair(tmp_path, "new")
    old_trust, new_trust = old.trust(), new.trust()
    settings = tmp_path / "settings.toml"
    settings.write_text(f'usage_db = "{usage}"\nssl_certfile = "{old.cert}"\nssl_keyfile = "{old.key}"\n')
    args = [str(model), "--platform", "null", "--served-model-name", "tiny", "--config", str(settings)]
    process = ServerProcess(args)
    try:
        process.wait_ready(60)
        url = process.base_url
        assert url.startswith("https://")
        with httpx.Client(verify=old_trust, trust_env=False, timeout=30) as client:
            body = {"prompt": "hello", "max_tokens": 5, "ignore_eos": True}
            assert client.post(f"{url}/v1/completions", json=body).status_code == 200
            until(lambda: bool(client.get(f"{url}/usage").json()["data"]))
            (total,) = client.get(f"{url}/usage").json()["data"]
        assert (total["model"], total["requests"], total["completion_tokens"]) == ("tiny", 1, 5)
        old.cert.write_bytes(new.cert.read_bytes())
        old.key.write_bytes(new.key.read_bytes())
        assert trusts(url, old_trust)
        process.process.send_signal(signal.SIGHUP)
        until(lambda: trusts(url, new_trust))
        assert not trusts(url, old_trust)
    finally:
        code = process.stop()
    assert code == 0
    with sqlite3.connect(usage) as reader:
        rows = reader.execute("SELECT outcome, completion_tokens, key_id FROM usage").fetchall()
    reader.close()
    assert rows == [("length", 5, "")]
