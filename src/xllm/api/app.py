"""The route table and the order of checks: host, key, route, headers, body, endpoint.

Every decision before the endpoint is made on the raw request head. Errors of any kind leave
through the connection's boundary and `error_map`; nothing here formats one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from xllm.api.admin import get_request, list_instances
from xllm.api.auth import PREFLIGHT_HEADERS, CorsRule, HostRule, KeyRing
from xllm.api.context import Context, FrontPort
from xllm.api.error_map import error_reply
from xllm.api.http import Reply, Request
from xllm.api.http.head import Head
from xllm.api.json_body import parse_object
from xllm.api.metrics import CONTENT_TYPE, Metrics
from xllm.api.openai.chat import chat_completions
from xllm.api.openai.completions import completions
from xllm.api.openai.models import get_model, list_models
from xllm.api.openai.tokenize import detokenize, tokenize, tokenizer_info
from xllm.api.profile import ProfileRoutes
from xllm.api.roles import list_roles, post_role
from xllm.api.usage import read_usage
from xllm.clock import Clock
from xllm.config import ObservabilityConfig, ServerConfig
from xllm.errors import NotFoundError, RequestError, UnavailableError
from xllm.observability.logs import log_event, num_dropped_lines
from xllm.service.profiler import Profiler
from xllm.service.usage import NullUsageStore, UsageStore
from xllm.service.watch.desk import WatchDesk
from xllm.version import __version__

access_log = logging.getLogger("xllm.access")

_NAMED = ("/v1/models/", "/requests/")
"""Routes whose last part is a name."""

JsonEndpoint = Callable[[Context, Request, Reply, dict[str, Any]], Awaitable[None]]
PlainEndpoint = Callable[[Request, Reply], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """`label` names the route in metrics and logs; the set of labels is closed.

    `admin`: for administrators only (`auth.KeyRing.check`).
    """

    label: str
    endpoint: PlainEndpoint
    admin: bool = False


class App:
    """The handler of every request. Made by `create_app`."""

    def __init__(
        self,
        front: FrontPort,
        config: ServerConfig,
        clock: Clock,
        metrics: Metrics,
        desk: WatchDesk,
        usage: UsageStore,
        profiler: Profiler | None = None,
    ) -> None:
        self._context = Context(front, clock, desk)
        self._desk = desk
        self._profiler = profiler if profiler is not None else Profiler(ObservabilityConfig(), clock)
        self._front = front
        self._metrics = metrics
        metrics.add_counter("xllm:log_lines_dropped", "Log lines of a sink that blocked", num_dropped_lines)
        metrics.add_counter("xllm:spans_dropped", "Spans not exported", lambda: desk.tracer.num_dropped)
        self._usage = usage
        self._keys = KeyRing(config.api_key, config.admin_key)
        self._hosts = HostRule(config.host, config.allowed_hosts)
        self._cors = CorsRule(config.allowed_origins)
        self.routes = self._route_table()
        self._by_path: dict[str, dict[str, Route]] = {}
        for (method, path), route in self.routes.items():
            self._by_path.setdefault(path, {})[method] = route

    async def __call__(self, request: Request, reply: Reply) -> None:
        """Answer one request. Raises XllmError for whatever is refused before the reply starts."""
        start_s = request.received_s = self._context.monotonic_s()
        methods = self._methods(request.head.path)
        route = methods.get(request.head.method) if methods else None
        label = route.label if route else "none"
        try:
            await self._answer(request, reply, methods, route)
        except Exception as error:  # noqa: BLE001  answered here so that it is counted with its status
            if reply.started:
                raise
            answer = error_reply(error, request.request_id)
            await reply.send(answer.status, answer.body, answer.headers)
        finally:
            # No status: the client left before there was one.
            self._metrics.on_response(label, reply.status or 499)
            if self._desk.profile.on:
                self._desk.profile.on_http(label, request.request_id, reply.status or 499, start_s)
            facts: dict[str, object] = {"serves": ",".join(request.serves)} if request.serves else {}
            log_event(
                access_log,
                "access",
                request_id=request.request_id,
                route=label,
                status=reply.status or 499,
                ms=round((self._context.monotonic_s() - start_s) * 1000, 1),
                **facts,
            )

    async def _answer(
        self, request: Request, reply: Reply, methods: dict[str, Route] | None, route: Route | None
    ) -> None:
        head = request.head
        self._hosts.check(head.host)
        cors = self._cors.headers(head)
        reply.extra.extend(cors)
        if cors and self._cors.is_preflight(head):
            await reply.send(200, b"", PREFLIGHT_HEADERS)
            return
        admin = route is not None and route.admin
        request.caller = self._keys.check(head, request.peer, admin=admin)
        if methods is None:
            raise NotFoundError("There is no such route.", code="route_not_found")
        if route is None:
            reply.extra.append(("allow", ", ".join(sorted(methods))))
            raise RequestError("The route does not take this method.", code="method_not_allowed")
        await route.endpoint(request, reply)

    def close(self) -> None:
        self._profiler.close()
        self._context.close()

    # -- routes -----------------------------------------------------------------------------------

    def _route_table(self) -> dict[tuple[str, str], Route]:
        json_routes: dict[str, JsonEndpoint] = {
            "/v1/chat/completions": chat_completions,
            "/v1/completions": completions,
            "/tokenize": tokenize,
            "/detokenize": detokenize,
        }
        get_routes: dict[str, PlainEndpoint] = {
            "/v1/models": self._list_models,
            "/v1/models/{id}": self._get_model,
            "/tokenizer_info": self._tokenizer_info,
            "/health": self._ready,
            "/ready": self._ready,
            "/live": self._live,
            "/version": self._version,
            "/metrics": self._show_metrics,
            "/usage": self._show_usage,
        }
        admin_routes: dict[str, PlainEndpoint] = {
            "/instances": self._instances,
            "/requests/{id}": self._request,
        }
        table = {("GET", path): Route(label=path, endpoint=e) for path, e in get_routes.items()}
        table |= {("GET", p): Route(label=p, endpoint=e, admin=True) for p, e in admin_routes.items()}
        for path, endpoint in json_routes.items():
            table["POST", path] = Route(label=path, endpoint=self._json(endpoint))
        profile = ProfileRoutes(self._context, self._profiler)
        table["POST", "/start_profile"] = Route(label="/start_profile", endpoint=profile.start, admin=True)
        table["POST", "/stop_profile"] = Route(label="/stop_profile", endpoint=profile.stop, admin=True)
        for path in ("/v1/role", "/v1/pd_role"):
            table["GET", path] = Route(label=path, endpoint=self._roles, admin=True)
            table["POST", path] = Route(label=path, endpoint=self._json(post_role), admin=True)
        return table

    def _methods(self, path: str) -> dict[str, Route] | None:
        for prefix in _NAMED:
            if path.startswith(prefix) and len(path) > len(prefix):
                return self._by_path.get(prefix + "{id}")
        return self._by_path.get(path)

    def _json(self, endpoint: JsonEndpoint) -> PlainEndpoint:
        async def run(request: Request, reply: Reply) -> None:
            _check_json_headers(request.head)
            body = await request.body()
            value = await self._context.run_text(len(body), lambda: parse_object(body))
            await endpoint(self._context, request, reply, value)

        return run

    async def _list_models(self, _: Request, reply: Reply) -> None:
        await reply.send(200, msgspec.json.encode(list_models(self._context)))

    async def _get_model(self, request: Request, reply: Reply) -> None:
        name = request.head.path.removeprefix("/v1/models/")
        await reply.send(200, msgspec.json.encode(get_model(self._context, _unquoted(name))))

    async def _tokenizer_info(self, _: Request, reply: Reply) -> None:
        await reply.send(200, msgspec.json.encode(tokenizer_info(self._context)))

    async def _live(self, _: Request, reply: Reply) -> None:
        await reply.send(200, b'{"status":"ok"}')

    async def _ready(self, _: Request, reply: Reply) -> None:
        ready, reason = self._front.ready()
        if not ready:
            raise UnavailableError("The server is not ready to serve.", code=reason)
        await reply.send(200, b'{"status":"ok"}')

    async def _version(self, _: Request, reply: Reply) -> None:
        await reply.send(200, msgspec.json.encode({"version": __version__}))

    async def _instances(self, _: Request, reply: Reply) -> None:
        await reply.send(200, msgspec.json.encode(list_instances(self._context)))

    async def _roles(self, _: Request, reply: Reply) -> None:
        await reply.send(200, msgspec.json.encode(list_roles(self._context)))

    async def _request(self, request: Request, reply: Reply) -> None:
        name = _unquoted(request.head.path.removeprefix("/requests/"))
        await reply.send(200, msgspec.json.encode(get_request(self._context, name)))

    async def _show_usage(self, request: Request, reply: Reply) -> None:
        body = await read_usage(self._usage, request.caller, request.head.query)
        await reply.send(200, msgspec.json.encode(body))

    async def _show_metrics(self, _: Request, reply: Reply) -> None:
        await reply.send(
            200,
            self._metrics.render(self._front, num_tasks=len(asyncio.all_tasks())),
            content_type=CONTENT_TYPE,
        )


def create_app(
    front: FrontPort,
    config: ServerConfig,
    *,
    clock: Clock,
    metrics: Metrics | None = None,
    desk: WatchDesk | None = None,
    usage: UsageStore | None = None,
    profiler: Profiler | None = None,
) -> App:
    """The HTTP side of a front. Pass the `Metrics` and the desk that observe the front, or get empty ones."""
    return App(
        front,
        config,
        clock,
        metrics if metrics is not None else Metrics(),
        desk if desk is not None else WatchDesk(clock),
        usage if usage is not None else NullUsageStore(),
        profiler,
    )


def _check_json_headers(head: Head) -> None:
    if any(e.lower() != b"identity" for e in head.values(b"content-encoding")):
        raise RequestError("Request bodies are not decompressed.", code="unsupported_media_type")
    types = head.values(b"content-type")
    if len(types) > 1 or not all(_is_json(t.decode("latin-1").lower()) for t in types):
        raise RequestError("The body must be application/json in UTF-8.", code="unsupported_media_type")


def _is_json(content_type: str) -> bool:
    kind, *parameters = (p.strip() for p in content_type.split(";"))
    charsets = [p for p in parameters if p.startswith("charset=")]
    return kind == "application/json" and all(
        c.removeprefix("charset=").strip('"') == "utf-8" for c in charsets
    )


def _unquoted(name: str) -> str:
    """Percent-escapes of a model's name (hub ids hold a slash); bytes that are no UTF-8 match nothing."""
    raw = bytearray()
    parts = name.split("%")
    raw += parts[0].encode("ascii")
    for part in parts[1:]:
        raw.append(int(part[:2], 16))
        raw += part[2:].encode("ascii")
    return raw.decode("utf-8", "replace")
