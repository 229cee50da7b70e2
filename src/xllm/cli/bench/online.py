"""`xllm bench serve`: load against any OpenAI-compatible URL, then one table and one JSON file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xllm.cli.bench import datasets
from xllm.cli.bench.arrivals import arrival_times, from_timestamps
from xllm.cli.bench.datasets import Ask
from xllm.cli.bench.generator import Target, run_load
from xllm.cli.bench.metrics import Outcome, parse_goodput, summarise
from xllm.cli.http_client import Exchange, Server, TransportError
from xllm.clock import SystemClock
from xllm.errors import ConfigError, UnavailableError


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="server to load [%(default)s]")
    add("--model", default="", help="model name; default: the first one the server lists")
    add("--api-key", default="", help="bearer key")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="[%(default)s]")
    add("--dataset-name", choices=("random", "custom", "trace"), default="random", help="[%(default)s]")
    add("--dataset-path", type=Path, help="custom: JSON lines; trace: Azure .csv or Mooncake .jsonl")
    add("--input-len", "--random-input-len", type=int, default=128, help="random: words a prompt [128]")
    add("--output-len", "--random-output-len", type=int, default=64, help="tokens an answer [64]")
    add("--num-prompts", type=int, default=100, help="requests [100]")
    add("--request-rate", type=float, default=float("inf"), help="requests a second; inf = all at once [inf]")
    add("--burstiness", type=float, default=1.0, help="1 = Poisson, below bursty, above regular [1]")
    add("--trace-speedup", type=float, default=1.0, help="trace: how much faster than recorded [1]")
    add("--max-concurrency", type=int, help="requests under way at once")
    add("--num-warmups", type=int, default=1, help="requests before the measurement [1]")
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="objectives, e.g. ttft:500 tpot:50")
    add("--seed", type=int, default=0, help="of prompts and arrivals [0]")
    add("--json", type=Path, help="also write the result here, with vLLM's key names")
    parser.set_defaults(measurement=run)


def run(args: argparse.Namespace) -> int:
    objectives = parse_goodput(args.goodput)
    if args.num_prompts < 1 or (args.max_concurrency is not None and args.max_concurrency < 1):
        raise ConfigError("--num-prompts and --max-concurrency must be at least 1")
    rng = np.random.default_rng(args.seed)
    asks = make_asks(args, rng)
    at_s = planned_times(args, asks, rng)
    outcomes, model = asyncio.run(_measure(args, asks, at_s))
    summary = _head(args, model) | summarise(outcomes, objectives)
    print(table(summary, objectives))
    for message, count in _errors(outcomes):
        print(f"  {count} failed: {message}", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps(summary | _rows(outcomes), indent=1) + "\n", encoding="utf-8")
    return 0 if summary["failed"] == 0 else 1


def make_asks(args: argparse.Namespace, rng: np.random.Generator) -> list[Ask]:
    if args.dataset_name == "random":
        return datasets.random_prompts(args.num_prompts, args.input_len, args.output_len, rng)
    if args.dataset_path is None:
        raise ConfigError(f"--dataset-name {args.dataset_name} needs --dataset-path FILE")
    if args.dataset_name == "custom":
        return datasets.custom(args.dataset_path, args.num_prompts, args.output_len)
    return datasets.trace(args.dataset_path, args.num_prompts, rng)


def planned_times(args: argparse.Namespace, asks: Sequence[Ask], rng: np.random.Generator) -> list[float]:
    """As recorded for a trace, unless a request rate is given; else from the arrival process."""
    recorded = [ask.at_s for ask in asks if ask.at_s is not None]
    if recorded and np.isinf(args.request_rate):
        return from_timestamps(recorded, args.trace_speedup)
    return arrival_times(len(asks), args.request_rate, args.burstiness, rng)


async def _measure(args: argparse.Namespace, asks: list[Ask], at_s: list[float]) -> tuple[list[Outcome], str]:
    server = Server.parse(args.base_url)
    model = args.model or await first_model(server, args.api_key)
    target = Target(server=server, model=model, chat=args.endpoint == "chat", api_key=args.api_key)
    clock = SystemClock()
    warmups = [asks[index % len(asks)] for index in range(args.num_warmups)]
    await run_load(target, warmups, [0.0] * len(warmups), clock, max_concurrency=1)
    with contextlib.closing(tqdm(total=len(asks), unit="req", disable=None, file=sys.stderr)) as bar:
        outcomes = await run_load(
            target, asks, at_s, clock, max_concurrency=args.max_concurrency, on_done=bar.update
        )
    return outcomes, model


async def first_model(server: Server, api_key: str) -> str:
    """The first id of GET /v1/models."""
    try:
        async with Exchange(server, "GET", "/v1/models", api_key=api_key) as response:
            listing = json.loads(await response.read())
            return str(listing["data"][0]["id"])
    except TransportError as error:
        raise UnavailableError(
            f"nothing answers at {server.host}:{server.port}; start a server or set --base-url"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            "the server does not list its models; name one with --model, and check --api-key"
        ) from error


def _head(args: argparse.Namespace, model: str) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if args.endpoint == "chat" else "openai",
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": args.num_prompts,
        "request_rate": args.request_rate if np.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "dataset_name": args.dataset_name,
        "seed": args.seed,
    }


def _rows(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """Per request, in the order of sending; seconds, as vLLM writes them."""
    return {
        "input_lens": [outcome.num_input_tokens for outcome in outcomes],
        "output_lens": [outcome.num_output_tokens for outcome in outcomes],
        "ttfts": [outcome.ttft_s for outcome in outcomes],
        "itls": [outcome.itls_s for outcome in outcomes],
        "latencies": [outcome.e2el_s for outcome in outcomes],
        "start_times": [outcome.start_s for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def _errors(outcomes: Sequence[Outcome]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error:
            counts[outcome.error] = counts.get(outcome.error, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def table(summary: dict[str, Any], objectives: dict[str, float]) -> str:
    rows = [
        ("Successful requests", f"{summary['completed']}"),
        ("Failed requests", f"{summary['failed']}"),
        ("Duration (s)", f"{summary['duration']:.2f}"),
        ("Input tokens", f"{summary['total_input_tokens']}"),
        ("Output tokens", f"{summary['total_output_tokens']}"),
        ("Request throughput (req/s)", f"{summary['request_throughput']:.2f}"),
        ("Output throughput (tok/s)", f"{summary['output_throughput']:.2f}"),
        ("Total throughput (tok/s)", f"{summary['total_token_throughput']:.2f}"),
        ("Peak output (tok/s)", f"{summary['max_output_tokens_per_s']:.0f}"),
        ("Peak concurrency", f"{summary['max_concurrent_requests']}"),
    ]
    if objectives:
        asked = " ".join(f"{name}<={limit:g}ms" for name, limit in objectives.items())
        rows.append((f"Goodput (req/s, {asked})", f"{summary['request_goodput']:.2f}"))
        rows.append(("SLO attainment", f"{summary['slo_attainment']:.1%}"))
    lines = [f"{name:<44} {value:>12}" for name, value in rows]
    columns = ("mean", "median", "std", "p50", "p90", "p95", "p99")
    lines.append("")
    lines.append(f"{'milliseconds':<12}" + "".join(f"{column:>10}" for column in columns))
    for name in ("ttft", "tpot", "itl", "e2el"):
        cells = "".join(f"{summary[f'{column}_{name}_ms']:>10.2f}" for column in columns)
        lines.append(f"{name.upper():<12}{cells}")
    if summary["max_client_lateness_ms"] > 50:
        lines.append(
            f"the generator itself was up to {summary['max_client_lateness_ms']:.0f} ms late: "
            "this machine is too slow for the load"
        )
    return "\n".join(lines)
