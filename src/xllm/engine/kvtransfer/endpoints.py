"""Names of places where KV pages are taken, and sockets to them.

`unix:<boot id>/<name>` is an abstract socket of this very kernel, `tcp:host:port` and `mooncake:host:port`
listen on the network. A name comes from a peer by way of a front, so it is checked
like any text from outside.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import socket
import struct
from dataclasses import dataclass
from os import getuid
from pathlib import Path
from typing import Literal

from xllm.errors import ConfigError
from xllm.wire.hello import parse_address
from xllm.wire.sockets import tune

Road = Literal["unix", "tcp", "mooncake"]

MAX_ENDPOINT_CHARS = 300
BACKLOG = 64
_NAME = re.compile(r"xllm-kv-[0-9a-f]{32}")
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`address` is what `socket.connect` takes."""

    road: Road
    address: str | tuple[str, int]


def boot_id() -> str:
    """Of the running kernel; empty where it does not tell."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def parse_endpoint(text: str, here: str) -> Endpoint | None:
    """None for what cannot be reached from the machine booted as `here`, or is no endpoint."""
    if len(text) > MAX_ENDPOINT_CHARS:
        return None
    road, _, rest = text.partition(":")
    if road == "unix":
        boot, _, name = rest.partition("/")
        return Endpoint("unix", "\0" + name) if here and boot == here and _NAME.fullmatch(name) else None
    if road in ("tcp", "mooncake"):
        try:
            host, port = parse_address(rest, "endpoint")
            ipaddress.ip_address(host)
        except (ConfigError, ValueError):
            return None  # a name would have to be looked up, which may take long
        return Endpoint("tcp" if road == "tcp" else "mooncake", (host, port)) if port else None
    return None


def listen_unix(here: str) -> tuple[socket.socket, str]:
    """(listener, its endpoint) on a name that nobody can have taken. Raises OSError."""
    name = f"xllm-kv-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind("\0" + name)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener, f"unix:{here}/{name}"


def listen_tcp(host: str, port: int, road: Road, told: str | None = None) -> tuple[socket.socket, str]:
    """(listener, its endpoint). `told` is where peers reach `host`, if that is not the same. ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"transfer_listen={host}:{port}: cannot listen there ({error.strerror}); choose another address",
            param="transfer_listen",
        ) from error
    bound = listener.getsockname()[1]
    try:
        # Peers get a number and look nothing up.
        where = socket.getaddrinfo(told or host, bound, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        listener.close()
        raise ConfigError(f"{told}: has no address", param="transfer_listen") from error
    return listener, f"{road}:[{where}]:{bound}" if ":" in str(where) else f"{road}:{where}:{bound}"


def begin_connect(endpoint: Endpoint) -> socket.socket:
    """A non-blocking socket on its way there. Raises OSError where that is hopeless at once."""
    if isinstance(endpoint.address, str):
        family = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in endpoint.address[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        if family == socket.AF_UNIX:
            sock.connect(endpoint.address)
        else:
            with contextlib.suppress(BlockingIOError):
                sock.connect(endpoint.address)
            tune(sock)
    except OSError:
        sock.close()
        raise
    return sock


def same_user(sock: socket.socket) -> bool:
    """Whether the other end of a Unix socket is a process of our own user (or root)."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(raw)[1] in (getuid(), 0)
