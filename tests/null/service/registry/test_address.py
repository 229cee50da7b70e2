"""What an address is, and what is none."""

from __future__ import annotations

import random

import pytest

from xllm.errors import ConfigError
from xllm.service.registry.address import Address, RegistryAddress, is_id, parse_address, parse_registry
from xllm.service.registry.backoff import Backoff


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", Address("127.0.0.1", 80)),
        ("host-1.example:65535", Address("host-1.example", 65535)),
        ("[::1]:4000", Address("::1", 4000)),
    ],
)
def test_addresses_come_back_as_they_were(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


BAD = "host|host:|:80|host:0|host:65536|host:-1|host:+1|host:1e3|host:٣|/run/x:1|a b:1|http://a:1|u@h:1|::1:4|[x]:1|[::1]|-h:1|h-:1"


@pytest.mark.parametrize("text", [*BAD.split("|"), "", "h:1\n", "h\x00:1", "h" * 254 + ":1"])
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="address|port"):
        parse_address(text)


def test_any_port_only_where_asked_for() -> None:
    assert parse_address("127.0.0.1:0", any_port=True).port == 0


def test_registries() -> None:
    both = (Address("a", 1), Address("b", 2))
    assert parse_registry("embedded") == RegistryAddress("embedded")
    assert parse_registry("etcd://a:1,b:2") == RegistryAddress("etcd", both)
    assert parse_registry("static://a:1,b:2") == RegistryAddress("static", both)


@pytest.mark.parametrize(
    "text", ["", "etcd", "etcd://", "http://a:1", "etcd://a", "static://a:1,", "etcd://a:1,a:1"]
)
def test_what_is_no_registry_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match="registry="):
        parse_registry(text)


def test_names_are_words() -> None:
    assert is_id("node-1.a_B")
    assert not any(map(is_id, ["", "a/b", ".hidden", "a b", "x" * 65, "ä", "a\n"]))


def test_backoff_doubles_within_bounds_and_starts_over() -> None:
    backoff = Backoff(0.1, 2.0, random.Random(1))
    delays = [backoff.delay_s() for _ in range(2000)]
    steps = [min(2.0, 0.1 * 2.0 ** min(i, 40)) for i in range(2000)]
    assert all(step / 2 <= delay <= step for delay, step in zip(delays, steps, strict=True))
    assert len(set(delays)) > 1900
    backoff.reset()
    assert backoff.delay_s() <= 0.1
