"""Routes for administrators: admin keys where there are any, else this machine alone."""

from __future__ import annotations

import pytest

from tests.null.api.conftest import MakeSite, Site, error_of
from xllm.api.app import Route
from xllm.api.auth import KeyRing
from xllm.api.caller import Caller
from xllm.api.http import Reply, Request
from xllm.api.http.head import Head
from xllm.errors import AccessError

HERE = ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")
ELSEWHERE = ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "", "unknown")


def head(key: str | None = None, path: str = "/instances", *more: tuple[bytes, bytes]) -> Head:
    headers = more if key is None else ((b"authorization", f"Bearer {key}".encode()), *more)
    return Head(
        method="GET",
        path=path,
        query="",
        http_1_0=False,
        headers=headers,
        host="localhost",
        content_length=None,
        chunked=False,
    )


def code(ring: KeyRing, given: Head, peer: str) -> str:
    """How an admin route answers: 'ok' or the error's code."""
    try:
        return "ok" if ring.check(given, peer, admin=True).is_admin else "not admin"
    except AccessError as error:
        return error.code


@pytest.mark.parametrize("peer", HERE)
def test_without_admin_keys_administration_is_for_this_machine(peer: str) -> None:
    assert code(KeyRing(()), head(), peer) == "ok"
    assert code(KeyRing(("k",)), head("k"), peer) == "ok"
    assert code(KeyRing(("k",)), head(), peer) == "invalid_api_key"
    assert code(KeyRing(("k",)), head("x"), peer) == "invalid_api_key"


@pytest.mark.parametrize("peer", ELSEWHERE)
def test_other_machines_need_an_admin_key(peer: str) -> None:
    assert code(KeyRing(()), head(), peer) == "permission_denied"
    assert code(KeyRing(("k",)), head("k"), peer) == "permission_denied"
    assert code(KeyRing(("k",), ("a",)), head("a"), peer) == "ok"


@pytest.mark.parametrize("name", [b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"])
def test_what_a_local_proxy_forwards_is_not_of_this_machine(name: bytes) -> None:
    assert (
        code(KeyRing(()), head(None, "/instances", (name, b"127.0.0.1")), "127.0.0.1") == "permission_denied"
    )


def test_with_admin_keys_nothing_else_opens_an_admin_route() -> None:
    ring = KeyRing(("k",), ("a", "b"))
    assert code(ring, head("b"), "10.0.0.1") == "ok"
    assert code(ring, head("k"), "127.0.0.1") == "permission_denied"
    assert code(ring, head(), "127.0.0.1") == "invalid_api_key"
    open_ring = KeyRing((), ("a",))
    assert code(open_ring, head(), "127.0.0.1") == "invalid_api_key"
    assert open_ring.check(head(None, "/v1/models"), "10.0.0.1") == Caller()


def test_an_admin_key_may_do_what_a_key_may_and_keys_have_names_that_tell_nothing() -> None:
    ring = KeyRing(("k",), ("a",))
    assert ring.check(head("a", "/v1/models"), "10.0.0.1").is_admin
    named = ring.check(head("k", "/v1/models"), "127.0.0.1")
    assert (len(named.key_id), named.is_admin) == (16, False)
    assert "k" not in named.key_id
    with pytest.raises(AccessError):
        ring.check(head("", "/v1/models"))


@pytest.fixture
async def site(make_site: MakeSite) -> Site:
    made: Site = await make_site(api_key=("k",), admin_key=("a",))

    async def who(request: Request, reply: Reply) -> None:
        await reply.send(200, b'{"peer":"%b"}' % request.peer.encode())

    made.app.routes["GET", "/who"] = route = Route(label="/who", endpoint=who, admin=True)
    made.app._by_path["/who"] = {"GET": route}
    return made


@pytest.mark.parametrize(("key", "status"), [("a", 200), ("k", 403), ("x", 401)])
async def test_over_http(site: Site, key: str, status: int) -> None:
    response = await site.client.get("/who", headers={"authorization": f"Bearer {key}"})
    assert response.status_code == status
    if status == 200:
        assert response.json() == {"peer": "127.0.0.1"}
    else:
        assert error_of(response)["code"] == {403: "permission_denied", 401: "invalid_api_key"}[status]
