"""TLS on the HTTP port: good clients of two kinds, hostile handshakes, certificates that cannot be used."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.null.api.conftest import MakeSite, Site, events
from xllm.api.http import Certificate
from xllm.config import ServerConfig
from xllm.errors import ConfigError

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="openssl makes the certificates")


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path

    @property
    def settings(self) -> dict[str, str]:
        return {"ssl_certfile": str(self.cert), "ssl_keyfile": str(self.key)}

    def trust(self, **versions: ssl.TLSVersion) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.cert))
        for name, version in versions.items():
            setattr(context, name, version)
        return context


def make_pair(folder: Path, name: str, *more: str) -> Pair:
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    command = [str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(pair.key), "-out", str(pair.cert), *(more or ("-nodes",))]
    subprocess.run(command, check=True, capture_output=True)
    return pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"), "one")


async def get(site: Site, trust: ssl.SSLContext, path: str = "/health") -> httpx.Response:
    async with httpx.AsyncClient(verify=trust, trust_env=False, timeout=20) as client:
        return await client.get(f"https://127.0.0.1:{site.port}{path}")


async def is_alive(site: Site, pair: Pair) -> bool:
    return (await get(site, pair.trust())).status_code == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_httpx_is_served(make_site: MakeSite, pair: Pair, version: ssl.TLSVersion) -> None:
    site = await make_site(**pair.settings)
    trust = pair.trust(minimum_version=version, maximum_version=version)
    async with httpx.AsyncClient(verify=trust, trust_env=False, timeout=20) as client:
        url = f"https://localhost:{site.port}/v1/completions"
        for _ in range(3):  # the connection is kept
            whole = await client.post(url, json={"prompt": "hello", "max_tokens": 20})
            assert whole.status_code == 200
        streamed = await client.post(url, json={"prompt": "hello", "max_tokens": 20, "stream": True})
        told = "".join(e["choices"][0]["text"] for e in events(streamed.text)[:-1])
        assert told == whole.json()["choices"][0]["text"]
        assert site.server.num_connections == 1


async def test_the_openai_client_is_served_and_may_leave_a_stream(make_site: MakeSite, pair: Pair) -> None:
    site = await make_site(**pair.settings)
    http = httpx.AsyncClient(verify=pair.trust(), trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=f"https://127.0.0.1:{site.port}/v1", api_key="none", http_client=http
    ) as client:
        stream = await client.completions.create(model="sample", prompt="hello", max_tokens=900, stream=True)
        async for _ in stream:
            break
        await stream.close()
        whole = await client.completions.create(model="sample", prompt="hello", max_tokens=5)
        assert whole.choices[0].finish_reason == "length"
    while site.front.snapshot().num_inflight_reqs:
        await asyncio.sleep(0.005)


async def test_a_large_body_both_ways(make_site: MakeSite, pair: Pair) -> None:
    site = await make_site(**pair.settings)
    async with httpx.AsyncClient(verify=pair.trust(), trust_env=False, timeout=20) as client:
        url = f"https://127.0.0.1:{site.port}"
        text = "many words " * 30_000
        told = await client.post(f"{url}/tokenize", json={"prompt": text})
        assert told.status_code == 200
        assert told.json()["count"] > 30_000


async def test_a_refused_body_still_gets_its_answer(make_site: MakeSite, pair: Pair) -> None:
    site = await make_site(**pair.settings, max_body_bytes=1000)
    async with httpx.AsyncClient(verify=pair.trust(), trust_env=False, timeout=20) as client:
        response = await client.post(f"https://127.0.0.1:{site.port}/tokenize", content=b"x" * 5000)
    assert response.status_code == 413


def hello(version: bytes = b"\x03\x01", length: int = 200) -> bytes:
    """The beginning of a ClientHello that promises more than comes."""
    return b"\x16" + version + length.to_bytes(2, "big") + b"\x01" + (length - 4).to_bytes(3, "big")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00" * 100,
        b"\x16\x03\x01\xff\xff" + b"\xff" * 70_000,
        hello(b"\x02\x00"),
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"",
    ],
    ids=["plain http", "zeros", "oversized record", "sslv2", "alert", "nothing then eof"],
)
async def test_what_is_no_tls_is_closed_and_hurts_nobody(
    make_site: MakeSite, pair: Pair, sent: bytes
) -> None:
    site = await make_site(**pair.settings)
    reader, writer = await site.raw(sent)
    if not sent:
        writer.write_eof()
    with contextlib.suppress(ConnectionError):
        answer = await reader.read()
        # At most a TLS alert; never HTTP, never anything of ours.
        assert len(answer) <= 7
        assert answer[:1] in (b"", b"\x15")
    while site.server.num_connections:
        await asyncio.sleep(0.005)
    assert await is_alive(site, pair)


async def test_old_versions_are_refused(make_site: MakeSite, pair: Pair) -> None:
    site = await make_site(**pair.settings)
    trust = pair.trust()
    trust.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        trust.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        trust.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx.ConnectError):
        await get(site, trust)
    assert await is_alive(site, pair)


async def test_silent_handshakes_are_cut_off_in_time(make_site: MakeSite, pair: Pair) -> None:
    site = await make_site(**pair.settings, header_timeout_s=0.2)
    readers = [(await site.raw(data))[0] for data in (b"", hello(), hello()[:3])]
    while site.server.num_connections < 3:  # they are counted while they say nothing
        await asyncio.sleep(0.005)
    for reader in readers:
        with contextlib.suppress(ConnectionError):
            assert await reader.read() in (b"", b"\x15\x03\x01\x00\x02\x02\x16")
    assert await is_alive(site, pair)


async def test_silent_handshakes_make_room_for_honest_clients(make_site: MakeSite, pair: Pair) -> None:
    site = await make_site(**pair.settings, max_connections=4)
    for _ in range(12):
        await site.raw(b"")
    for _ in range(3):
        assert await is_alive(site, pair)
    assert site.server.num_connections <= 5


async def test_shutting_down_ends_handshakes(make_site: MakeSite, pair: Pair) -> None:
    site = await make_site(**pair.settings)
    reader, _ = await site.raw(hello())
    while not site.server.num_connections:
        await asyncio.sleep(0.005)
    assert await site.server.drain(site.front, 5.0)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""


async def test_a_new_certificate_is_taken_while_serving(make_site: MakeSite, tmp_path: Path) -> None:
    old, new = make_pair(tmp_path, "old"), make_pair(tmp_path, "new")
    site = await make_site(**old.settings)
    async with httpx.AsyncClient(verify=old.trust(), trust_env=False) as kept:
        url = f"https://127.0.0.1:{site.port}/health"
        assert (await kept.get(url)).status_code == 200
        old.cert.write_bytes(new.cert.read_bytes())
        with pytest.raises(ConfigError, match="does not belong"):
            site.server.reload_certificate()  # half of the new pair is there
        trust_old = old_trust = ssl.create_default_context(cadata=(await _served_cert(site)))
        assert (await get(site, old_trust)).status_code == 200
        old.key.write_bytes(new.key.read_bytes())
        site.server.reload_certificate()
        assert (await get(site, new.trust())).status_code == 200
        with pytest.raises(httpx.ConnectError):
            await get(site, trust_old)
        assert (await kept.get(url)).status_code == 200


async def _served_cert(site: Site) -> str:
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=trust)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        await writer.wait_closed()
    return ssl.DER_cert_to_PEM_cert(der)


def test_certificates_that_cannot_be_used_are_told_at_the_start(pair: Pair, tmp_path: Path) -> None:
    other = make_pair(tmp_path, "other")
    locked = make_pair(tmp_path, "locked", "-passout", "pass:secret")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    cases: list[tuple[Any, Any, str]] = [
        (tmp_path / "missing.crt", pair.key, "ssl_certfile: cannot read"),
        (pair.cert, tmp_path / "missing.key", "ssl_keyfile: cannot read"),
        (pair.cert, tmp_path, "ssl_keyfile: cannot read"),
        (pair.cert, other.key, "does not belong"),
        (nonsense, pair.key, "no certificate and key"),
        (pair.cert, nonsense, "no certificate and key"),
        (pair.cert, None, "no certificate and key"),
        (locked.cert, locked.key, "encrypted"),
    ]
    for cert, key, message in cases:
        with pytest.raises(ConfigError, match=message):
            Certificate(str(cert), None if key is None else str(key))
    both = tmp_path / "both.pem"
    both.write_bytes(pair.cert.read_bytes() + pair.key.read_bytes())
    assert Certificate(str(both), None).context.minimum_version == ssl.TLSVersion.TLSv1_2


async def test_a_key_without_a_certificate_is_a_mistake(make_site: MakeSite, pair: Pair) -> None:
    with pytest.raises(ConfigError, match="needs its certificate"):
        await make_site(ssl_keyfile=str(pair.key))
    assert ServerConfig().ssl_certfile is None
