"""`xllm explain REQUEST_ID`: why a request went where it went, and where its time was spent.

Asks a running server (`GET /requests/{id}`) and prints its numbers for people; `--json` prints them as
they are. Accepts the id of a completion, the server's own id, or the client's x-request-id.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from xllm.cli.http_client import Exchange, Server, TransportError
from xllm.errors import NotFoundError, UnavailableError

BAR_WIDTH = 40


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="chatcmpl-…, cmpl-…, or an x-request-id")
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="server that took the request [%(default)s]")
    add("--api-key", default="", help="admin key; none is needed on an open server's own machine")
    add("--json", action="store_true", help="print the server's JSON")


def run(args: argparse.Namespace) -> int:
    answer = asyncio.run(fetch(Server.parse(args.base_url), args.request_id, args.api_key))
    if args.json:
        print(json.dumps(answer, indent=2))
        return 0
    for index, request in enumerate(answer["requests"]):
        if index:
            print()
        for line in explained(request):
            print("".join(c if c.isprintable() else "?" for c in line))
    return 0


async def fetch(server: Server, request_id: str, api_key: str) -> dict[str, Any]:
    """Raises NotFoundError for an unknown request, UnavailableError when the server does not answer so."""
    path = f"/requests/{quote(request_id, safe='')}"
    try:
        async with Exchange(server, "GET", path, api_key=api_key) as response:
            body = await response.read()
            status = response.status
    except TransportError as error:
        message = f"nothing answers at {server.host}:{server.port}; set --base-url"
        raise UnavailableError(message) from error
    if status == 404:
        raise NotFoundError(
            f"the server at {server.host}:{server.port} does not know {request_id} (any more)"
        )
    if status in (401, 403):
        raise UnavailableError(f"the server refused (HTTP {status}): set --api-key to an admin key")
    try:
        answer = json.loads(body)
        if status == 200 and isinstance(answer["requests"], list):
            return dict(answer)
    except (ValueError, KeyError, TypeError):
        pass
    raise UnavailableError(
        f"HTTP {status} and no explanation; is {server.host}:{server.port} an xLLM server?"
    )


def explained(request: dict[str, Any]) -> Iterator[str]:
    """The lines for one request."""
    tokens = request["tokens"]
    end = request["outcome"] or "still running"
    yield f"request {request['id']}  (client id {request['client_id'] or '-'})"
    yield f"model {request['model']}, {end}, attempts {request['attempts']}, instance {request['instance']}"
    yield (
        f"tokens: {tokens['prompt']} prompt"
        + (f" ({tokens['cached']} from cache)" if tokens["cached"] else "")
        + (f", {tokens['completion']} completion" if tokens["completion"] is not None else "")
    )
    yield ""
    yield "Where the time went"
    yield from _bars(request["spent_ms"])
    yield ""
    yield "Predicted and seen"
    yield from _predictions(request["predicted"], request["seen"])
    for event in request["events"]:
        if event["kind"] == "placed":
            yield ""
            yield from _placement(event)
    yield ""
    yield "What happened"
    for event in request["events"]:
        facts = {k: v for k, v in event.items() if k not in ("t_ms", "kind", "scores", "reasons")}
        yield f"  {event['t_ms']:>12.1f} ms  {event['kind']:<16} {_pairs(facts)}".rstrip()
    if request["events_left_out"]:
        yield f"  ({request['events_left_out']} more events were not kept)"


def _bars(spent: dict[str, float]) -> Iterator[str]:
    total = spent["total"]
    for name, ms in spent.items():
        if name == "total" or (not ms and name not in ("queue", "prefill", "decode")):
            continue
        share = ms / total if total else 0.0
        bar = "#" * round(share * BAR_WIDTH)
        yield f"  {name:<10} {ms:>12.1f} ms {share:>6.1%}  {bar}".rstrip()
    yield f"  {'total':<10} {total:>12.1f} ms"


def _predictions(predicted: dict[str, float | None], seen: dict[str, float | None]) -> Iterator[str]:
    titles = {"ttft_ms": "first token after placement", "tpot_ms": "per further token"}
    for name, title in titles.items():
        yield f"  {title:<28} predicted {_number(predicted[name])}, seen {_number(seen[name])}"
    yield f"  {'first token for the client':<28} seen {_number(seen['client_ttft_ms'])}"


def _placement(event: dict[str, Any]) -> Iterator[str]:
    yield f"Why {event['instance']} (attempt {event['attempt']}): {', '.join(event['reasons']) or '-'}"
    for name, score in event["scores"].items():
        mark = "*" if name == event["instance"] else " "
        yield f"  {mark} {name:<24} score {score:.6g}"
    if not event["scores"]:
        yield "    the policy gives no scores"
    if event.get("scores_left_out"):
        yield f"    ({event['scores_left_out']} more candidates scored lower)"


def _pairs(facts: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in facts.items() if value not in ("", None))


def _number(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.1f} ms"
