"""How a TCP connection between a front and an engine is set up; both sides use it.

No frames, no hand-shake.
"""

from __future__ import annotations

import socket

USER_TIMEOUT_MS = 30_000
"""Sent and not acknowledged for so long: the host is gone, or its process has stopped reading for good."""

_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


def tune(sock: socket.socket) -> None:
    """Small frames leave at once; a peer whose host is gone is noticed. Nothing to do on a Unix socket."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not everywhere known; the pulses tell the same, only later.
    for name, value in (*_KEEPALIVE, ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
