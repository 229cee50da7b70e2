"""Addresses from settings and from the registry: `host:port`, parsed strictly, and the registry's own URL.

Nothing here connects. Paths, Unix sockets, user names and empty hosts are never addresses.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

from xllm.errors import ConfigError

MAX_ENDPOINTS = 64

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_V6 = re.compile(r"\[([0-9A-Fa-f:.]{2,45})\]")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, order=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it surely is this machine; a name other than localhost may lead anywhere."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class RegistryAddress:
    kind: Literal["embedded", "etcd", "static"]
    endpoints: tuple[Address, ...] = ()


def parse_address(text: str, *, any_port: bool = False) -> Address:
    """`host:port` or `[v6]:port`; port 0 only with `any_port`. Raises ValueError without the text in it."""
    host, colon, digits = text.rpartition(":")
    bracketed = _V6.fullmatch(host)
    if not colon or (bracketed is None and _NAME.fullmatch(host) is None):
        raise ValueError("an address is host:port")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5):
        raise ValueError("a port is a number")
    port = int(digits)
    if not (0 if any_port else 1) <= port <= 65535:
        raise ValueError("a port is at most 65535, and 0 only where any will do")
    return Address(bracketed[1] if bracketed else host, port)


def parse_registry(text: str) -> RegistryAddress:
    """`embedded`, `etcd://host:port[,host:port]` or `static://host:port[,host:port]`. Raises ConfigError."""
    if text == "embedded":
        return RegistryAddress("embedded")
    scheme, separator, rest = text.partition("://")
    if separator and scheme in ("etcd", "static"):
        parts = rest.split(",")
        try:
            endpoints = tuple(parse_address(part) for part in parts)
        except ValueError as error:
            raise ConfigError(f"registry={text!r}: {error}; give {scheme}://host:port") from error
        if len(set(endpoints)) != len(endpoints) or len(endpoints) > MAX_ENDPOINTS:
            message = f"registry={text!r}: at most {MAX_ENDPOINTS} addresses, each once"
            raise ConfigError(message)
        return RegistryAddress("etcd" if scheme == "etcd" else "static", endpoints)
    raise ConfigError(
        f"registry={text!r} is no registry; use embedded, etcd://host:port or static://host:port"
    )


def is_id(text: str) -> bool:
    """Whether it may be a member's or a cluster's name: it becomes part of a key and of log lines."""
    return _ID.fullmatch(text) is not None
