"""Keys, hosts, origins, methods and paths: decided on the raw head, the same for every route."""

from __future__ import annotations

from typing import Any

import pytest

from tests.null.api.conftest import MakeSite, Site, error_of
from xllm.api.auth import PUBLIC_PATHS

KEY = "k-é-1"
EXPECTING = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
)
GOOD = {"authorization": f"Bearer {KEY}".encode()}


@pytest.fixture
async def locked(make_site: MakeSite) -> Site:
    site: Site = await make_site(api_key=("other", KEY))
    return site


async def test_every_route_but_the_public_ones_needs_a_key(locked: Site) -> None:
    assert {p for _, p in locked.app.routes} >= PUBLIC_PATHS
    for method, path in locked.app.routes:
        url = path.replace("{id}", "sample")
        anonymous = await locked.client.request(method, url, json={} if method == "POST" else None)
        assert (anonymous.status_code == 401) is (path not in PUBLIC_PATHS), path
        known = await locked.client.request(method, url, headers=GOOD, json={} if method == "POST" else None)
        assert known.status_code != 401, path


@pytest.mark.parametrize(
    "path",
    [
        "/v1//models",
        "/V1/models",
        "/v1/models/",
        "/v1/%2e%2e/health",
        "/health/",
        "/health;x",
        "//health",
        "/v1%2Fmodels",
        "/",
        "/nope",
    ],
)
async def test_a_path_that_is_no_route_is_401_without_a_key_and_404_with_one(locked: Site, path: str) -> None:
    url = f"http://127.0.0.1:{locked.port}{path}"
    assert (await locked.client.get(url)).status_code == 401
    response = await locked.client.get(url, headers=GOOD)
    assert (response.status_code, error_of(response)["code"]) in {
        (404, "route_not_found"),
        (404, "model_not_found"),
    }


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer  " + KEY.encode(),
        b"Basic " + KEY.encode(),
        KEY.encode(),
        b"Bearer wrong",
        b"Bearer " + KEY.encode()[:-1],
        b"Bearer " + KEY.encode() + b"x",
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 50_000,
    ],
)
async def test_wrong_keys_all_look_the_same(locked: Site, header: bytes) -> None:
    response = await locked.client.get("/v1/models", headers={"authorization": header})
    nothing = await locked.client.get("/v1/models")
    assert response.status_code == 401
    assert response.json() == nothing.json()
    assert error_of(response)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


async def test_the_scheme_is_case_insensitive_and_one_header_is_one(locked: Site) -> None:
    lower = await locked.client.get("/v1/models", headers={"authorization": f"bearer {KEY}".encode()})
    assert lower.status_code == 200
    twice = [("authorization", f"Bearer {KEY}".encode())] * 2
    assert (await locked.client.get("/v1/models", headers=twice)).status_code == 401
    assert (await locked.client.get(f"/v1/models?api_key={KEY}")).status_code == 401


async def test_a_bad_key_is_told_before_the_body_is_read(locked: Site) -> None:
    reader, _ = await locked.raw(EXPECTING % 1_000_000)
    assert (await reader.readline()).startswith(b"HTTP/1.1 401")


async def test_a_good_key_is_told_to_go_on(site: Site) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    reader, writer = await site.raw(EXPECTING % len(body))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io"])
async def test_a_foreign_host_is_refused_before_anything_else(locked: Site, host: str) -> None:
    response = await locked.client.get("/health", headers={"host": host})
    assert (response.status_code, error_of(response)["code"]) == (421, "bad_host")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:80", "10.1.2.3", "my.name"]
)
async def test_own_names_and_plain_addresses_are_fine(make_site: MakeSite, host: str) -> None:
    site = await make_site(allowed_hosts=("my.name",))
    assert (await site.client.get("/health", headers={"host": host})).status_code == 200


async def test_forwarding_headers_change_nothing(locked: Site) -> None:
    headers = {"x-forwarded-host": "localhost", "x-original-url": "/health", "x-http-method-override": "GET"}
    assert (await locked.client.get("/v1/models", headers=headers)).status_code == 401


async def test_cors_names_the_allowed_origin_and_no_other(make_site: MakeSite) -> None:
    site = await make_site(allowed_origins=("https://app.example",), api_key=(KEY,))
    ask = {"access-control-request-method": "POST"}
    allowed = await site.client.options("/v1/completions", headers={"origin": "https://app.example", **ask})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in allowed.headers
    for origin in ("https://evil.example", "null", "https://app.example.evil"):
        refused = await site.client.options("/v1/completions", headers={"origin": origin, **ask})
        assert refused.status_code == 401
        assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "TRACE", "PATCH", "HEAD", "FOO"])
async def test_other_methods_are_405_with_allow(site: Site, method: str) -> None:
    response = await site.client.request(method, "/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
        "application/jsonp",
    ],
)
async def test_other_bodies_are_415(site: Site, content_type: str) -> None:
    response = await site.client.post(
        "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": content_type}
    )
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("headers", [{}, {"content-type": 'Application/JSON; charset="UTF-8"'}])
async def test_json_may_go_without_a_type(site: Site, headers: dict[str, str]) -> None:
    response = await site.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("sent", "echoed"), [("abc-1.2_3", True), ("x" * 129, False), ("a b", False), ("é", False), ("", False)]
)
async def test_request_ids_are_echoed_when_they_are_harmless(site: Site, sent: str, echoed: bool) -> None:
    for path in ("/health", "/nope", "/v1/completions"):
        response = await site.client.get(path, headers={"x-request-id": sent.encode()})
        assert (response.headers["x-request-id"] == sent) is echoed
        assert len(response.headers["x-request-id"]) in (len(sent), 32)


async def test_the_same_client_id_twice_is_two_requests(site: Site) -> None:
    headers = {"x-request-id": "same"}
    ids = set()
    for _ in range(2):
        response = await site.client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        ids.add(response.json()["id"])
    assert len(ids) == 2


async def test_models_are_listed_under_every_name(site: Site) -> None:
    listed: Any = (await site.client.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == ["sample"]
    assert (await site.client.get("/v1/models/s%61mple")).json() == listed["data"][0]
    assert error_of(await site.client.get("/v1/models/other"))["code"] == "model_not_found"
