"""Which HTTP server survives hostile bytes? The measurement behind docs/design/0001-http-server.md.

`python benchmarks/http_spike.py` starts a hello application on every installed candidate, plays
`xllm.testing.hostile_http` against it and prints one Markdown table. `serve NAME PORT` is the
child's entry point. Candidates are configured with every limit they offer.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from xllm.testing.hostile_http import cases, run_case, verdict

HEAD_S, BODY_S, MAX_BODY = 2.0, 2.0, 4 * 1024 * 1024


async def hello(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Reads the whole body, then says hello: an application without any care of its own."""
    if scope["type"] != "http":
        return
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if not message.get("more_body", False):
            break
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


def serve_uvicorn(http: str) -> Callable[[int], None]:
    def run(port: int) -> None:
        import uvicorn

        more = {"h11_max_incomplete_event_size": 65536} if http == "h11" else {}
        uvicorn.run(
            hello,
            host="127.0.0.1",
            port=port,
            http=http,
            timeout_keep_alive=2,
            limit_concurrency=64,
            log_level="critical",
            lifespan="off",
            **more,
        )

    return run


def serve_aiohttp(port: int) -> None:
    from aiohttp import web

    async def handler(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({})

    app = web.Application(client_max_size=MAX_BODY)
    app.router.add_route("*", "/{tail:.*}", handler)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, keepalive_timeout=2)


def serve_hypercorn(port: int) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.h11_max_incomplete_size = 65536
    config.read_timeout = 2
    config.keep_alive_timeout = 2
    config.errorlog = None
    asyncio.run(serve(hello, config))  # type: ignore[arg-type]


def serve_granian(port: int) -> None:
    from granian.constants import Interfaces
    from granian.http import HTTP1Settings
    from granian.server.embed import Server

    settings = HTTP1Settings(header_read_timeout=2000, max_buffer_size=65536)
    server = Server(hello, address="127.0.0.1", port=port, interface=Interfaces.ASGI, http1_settings=settings)
    asyncio.run(server.serve())


def serve_xllm(port: int) -> None:
    from xllm.api.http import HttpLimits, Reply, Request, serve_connections

    async def handler(request: Request, reply: Reply) -> None:
        await request.body()
        await reply.send(200, b"{}")

    async def run() -> None:
        limits = HttpLimits(header_timeout_s=HEAD_S, body_timeout_s=BODY_S, max_body_bytes=MAX_BODY)
        listener = await serve_connections(handler, "127.0.0.1", port, limits)
        await listener.wait_closed()

    asyncio.run(run())


CANDIDATES: dict[str, tuple[str, Callable[[int], None]]] = {
    "uvicorn (h11)": ("uvicorn", serve_uvicorn("h11")),
    "uvicorn (httptools)": ("httptools", serve_uvicorn("httptools")),
    "aiohttp": ("aiohttp", serve_aiohttp),
    "hypercorn": ("hypercorn", serve_hypercorn),
    "granian": ("granian", serve_granian),
    "xllm.api.http (h11)": ("h11", serve_xllm),
}


def available(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def measure(name: str) -> dict[str, tuple[str, str, bool]]:
    """case name -> (layer, reason it failed or '', whether all its errors were JSON)."""
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, __file__, "serve", name, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.1)
        return asyncio.run(_measure(port))
    finally:
        child.terminate()
        child.wait()


async def _measure(port: int) -> dict[str, tuple[str, str, bool]]:
    gate = asyncio.Semaphore(8)
    result = {}

    async def one(case: Any) -> None:
        async with gate:
            outcome = await run_case(case, "127.0.0.1", port)
        errors = [s for s in outcome.statuses if s >= 400]
        result[case.name] = (case.layer, verdict(case, outcome), outcome.json_errors or not errors)

    table = cases(HEAD_S, BODY_S, MAX_BODY)
    await asyncio.gather(*(one(c) for c in table))
    return {c.name: result[c.name] for c in table}


def report(results: dict[str, dict[str, tuple[str, str, bool]]]) -> None:
    names = list(results)
    print("| case | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for case in next(iter(results.values())):
        cells = [results[n][case][1] or "ok" for n in names]
        print(f"| {case} | " + " | ".join(cells) + " |")
    for title, pick in (("server layer", "server"), ("app layer", "app")):
        rows = [[r for r in results[n].values() if r[0] == pick] for n in names]
        print(
            f"| **passed, {title}** | "
            + " | ".join(f"{sum(not r[1] for r in rs)}/{len(rs)}" for rs in rows)
            + " |"
        )
    print(
        "| **errors in JSON** | "
        + " | ".join(f"{sum(r[2] for r in results[n].values())}/{len(results[n])}" for n in names)
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", nargs="?", default="measure", choices=["measure", "serve"])
    parser.add_argument("name", nargs="?")
    parser.add_argument("port", nargs="?", type=int)
    args = parser.parse_args()
    if args.action == "serve":
        CANDIDATES[args.name][1](args.port)
        return
    wanted = [args.name] if args.name else [n for n, (module, _) in CANDIDATES.items() if available(module)]
    report({name: measure(name) for name in wanted})


if __name__ == "__main__":
    main()
