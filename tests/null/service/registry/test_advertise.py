"""Which address an instance tells others."""

from __future__ import annotations

import pytest

from xllm.config import ClusterConfig
from xllm.errors import ConfigError
from xllm.service.registry.address import Address, parse_address
from xllm.service.registry.advertise import advertised

BOUND = ("0.0.0.0", 4711)


def test_what_was_set_is_told_and_the_port_is_filled_in() -> None:
    assert advertised(ClusterConfig(advertise="gpu-1.example:80"), BOUND, ()) == "gpu-1.example:80"
    assert advertised(ClusterConfig(advertise="gpu-1.example:0"), BOUND, ()) == "gpu-1.example:4711"
    assert advertised(ClusterConfig(advertise="[2001:db8::1]:0"), BOUND, ()) == "[2001:db8::1]:4711"


@pytest.mark.parametrize("text", ["", "host", "/run/x", "host:99999"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="advertise"):
        advertised(ClusterConfig(advertise=text), BOUND, ())


def test_a_bound_address_is_told_as_it_is() -> None:
    assert advertised(ClusterConfig(), ("127.0.0.1", 5), ()) == "127.0.0.1:5"
    assert advertised(ClusterConfig(), ("::1", 5), ()) == "[::1]:5"
    assert advertised(ClusterConfig(), ("localhost", 5), ()) == "localhost:5"


def test_listening_everywhere_tells_the_address_towards_the_registry() -> None:
    assert advertised(ClusterConfig(), BOUND, [Address("127.0.0.1", 2379)]) == "127.0.0.1:4711"
    assert parse_address(advertised(ClusterConfig(), BOUND, ())).port == 4711


def test_when_it_cannot_be_known_it_must_be_set() -> None:
    with pytest.raises(ConfigError, match="set advertise"):
        advertised(ClusterConfig(), BOUND, [Address("no-such-host.invalid", 1)])
