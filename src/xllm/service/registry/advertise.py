"""Which address a listening instance tells others: what it was told to, or the one it surely has."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Sequence

from xllm.config import ClusterConfig
from xllm.errors import ConfigError
from xllm.service.registry.address import Address, parse_address


def advertised(cluster: ClusterConfig, bound: tuple[str, int], registry: Sequence[Address]) -> str:
    """`host:port` for the registry. Raises ConfigError when it cannot be known.

    `advertise` may leave the port at 0 = the one that is bound. When listening on all interfaces it is the
    address from which this host reaches the registry: where that answers to, fronts can answer to as well.
    """
    host, port = bound
    if cluster.advertise is not None:
        try:
            told = parse_address(cluster.advertise, any_port=True)
        except ValueError as error:
            raise ConfigError(f"advertise={cluster.advertise!r}: {error}", param="advertise") from error
        return str(Address(told.host, told.port or port))
    if not _is_any(host):
        return str(Address(host, port))
    for endpoint in registry:
        outward = _outward_host(endpoint)
        if outward is not None:
            return str(Address(outward, port))
    if registry:
        raise ConfigError(
            f"listen={cluster.listen}: which of this host's addresses is reached by others is unknown; "
            "set advertise to host:port",
            param="advertise",
        )
    return str(Address(socket.gethostname(), port))


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False  # a name


def _outward_host(endpoint: Address) -> str | None:
    """This host's address on the way to `endpoint`. Nothing is sent: a datagram socket only picks a route."""
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)
        for family, kind, proto, _, address in found[:4]:
            with contextlib.suppress(OSError), socket.socket(family, kind, proto) as probe:
                probe.connect(address)
                host: str = probe.getsockname()[0]
                return host.partition("%")[0]
    return None
