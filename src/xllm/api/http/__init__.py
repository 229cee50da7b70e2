"""A strict HTTP/1.1 server around h11: bytes in, one handler call per request, bytes out.

Ours are limits, time and refusals, h11's is the protocol. Knows no routes, keys or models
(`api/app.py`). Why not a whole server: docs/design/0001-http-server.md.
"""

from __future__ import annotations

from xllm.api.http.exchange import Handler, Reply, Request
from xllm.api.http.limits import HttpLimits
from xllm.api.http.listener import Listener, serve_connections
from xllm.api.http.tls import Certificate

__all__ = ["Certificate", "Handler", "HttpLimits", "Listener", "Reply", "Request", "serve_connections"]
