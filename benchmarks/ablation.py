"""Every technique off in turn, against everything on: the same tokens, and what each is worth.

    python -m benchmarks.ablation --rounds 3 --json ablation.json

Rows are the table ROWS: a setting that this build does not know is reported as such. Rounds are interleaved
and rotate, medians over rounds are shown with their spread. Exit code 1 when a row's tokens differ.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.compare import machine
from xllm.artifacts.write import write_hf_dir
from xllm.cli.serving import SECTIONS
from xllm.config.fields import settings
from xllm.testing.server_process import ServerProcess, serve
from xllm.testing.tiny_tokenizer import tiny_assets

TINY = "tiny"


@dataclass(frozen=True, slots=True)
class Row:
    """`settings` are what differs from everything on. `gains`: also run on the models beside the first;
    `reported`: gains that the report of the original tells for this technique, in percent of tokens/s."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    gains: bool = False
    reported: str = ""


ROWS = (
    Row("everything on", gains=True),
    Row("async off", {"async_scheduling": "off"}, True, "+17.4 (1.5B), +0.6 (7B), +6.6 (32B)"),
    Row("programs off", {"programs": "off"}, True, "+27.4 (1.7B), +8.5 (4B)"),
    Row("xTensor instead of paged", {"kv_memory": "xtensor"}),
    Row("prefix cache off", {"enable_prefix_caching": "false"}),
    Row("chunked prefill off", {"enable_chunked_prefill": "false"}),
)

GAPS = ("xllm:step_gaps_total", "xllm:step_gap_seconds_total")
SHARED = "You are a careful assistant. Answer in one sentence, and name no source that you do not know. "


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one row, level and round. `gap_us`: how long the device idled between two steps of busy times."""

    row: str
    level: int
    tokens_per_s: float
    ttft_ms: float
    gap_us: float | None
    digest: str


def prompts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = "river stone king light under seven green was then who sang over old road count of".split()
    return [SHARED * 3 + " ".join(rng.choices(words, k=rng.choice([8, 40, 120]))) for _ in range(count)]


async def load(url: str, model: str, texts: Sequence[str], level: int, output_len: int) -> tuple[Any, ...]:
    """(seconds, times to first token, output tokens, answers by prompt) with `level` requests at a time."""
    limit = asyncio.Semaphore(level)
    firsts: list[float] = []
    num_tokens = 0

    async def ask(http: httpx.AsyncClient, index: int) -> str:
        nonlocal num_tokens
        # Greedy and seeded in turn, so that the sampler is part of what must not change.
        body = {
            "model": model, "prompt": texts[index], "max_tokens": output_len, "ignore_eos": True,
            "temperature": index % 2 * 0.8, "seed": index,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        async with limit:
            began, first, text = time.monotonic(), None, ""
            async with http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise RuntimeError((await response.aread())[:300])
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    for choice in event["choices"]:
                        first = first or time.monotonic()
                        text += choice["text"]
                    if event.get("usage"):
                        num_tokens += event["usage"]["completion_tokens"]
            firsts.append(((first or time.monotonic()) - began) * 1000)
            return text

    limits = httpx.Limits(max_connections=level + 2)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as http:
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(http, i) for i in range(len(texts))))
        return time.monotonic() - began, firsts, num_tokens, answers


def measure(server: ServerProcess, row: Row, model: str, args: argparse.Namespace) -> list[Seen]:
    found = []
    asyncio.run(load(server.base_url, model, prompts(2, 0), 2, 8))  # programs are made, pages touched
    for level in args.levels:
        texts = prompts(max(args.min_requests, 2 * level), level)
        gaps, gap_s = (server.count(name) for name in GAPS)
        seconds, firsts, num_tokens, answers = asyncio.run(
            load(server.base_url, model, texts, level, args.output_len)
        )
        gaps, gap_s = (server.count(name) - before for name, before in zip(GAPS, (gaps, gap_s), strict=True))
        found.append(
            Seen(
                row=row.name,
                level=level,
                tokens_per_s=num_tokens / seconds,
                ttft_ms=statistics.median(firsts),
                gap_us=gap_s / gaps * 1e6 if gaps else None,
                digest=hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16],
            )
        )
    return found


def unknown(row: Row) -> list[str]:
    """Settings, and values of settings, that this build does not have."""
    known = settings(*SECTIONS)
    return [
        f"{name}={value}"
        for name, value in row.settings.items()
        if name not in known or (known[name].choices and value not in known[name].choices)
    ]


def run_model(
    name: str, model: str, rows: Sequence[Row], args: argparse.Namespace
) -> tuple[list[Seen], dict[str, str]]:
    """What was seen, and by row why it was not run."""
    skipped = {
        row.name: f"this build does not know {', '.join(unknown(row))}" for row in rows if unknown(row)
    }
    seen: list[Seen] = []
    for number in range(args.rounds):
        turn = number % len(rows)
        for row in (*rows[turn:], *rows[:turn]):
            if row.name in skipped:
                continue
            env = {**os.environ, **{f"XLLM_{key.upper()}": value for key, value in row.settings.items()}}
            flags = ["--platform", args.platform, "--max-model-len", "1024", "--served-model-name", name]
            flags += ["--load-format", "dummy"] if name == TINY else []
            try:
                with serve(model, *flags, env=env) as server:
                    seen += measure(server, row, name, args)
            except RuntimeError as error:
                skipped[row.name] = f"refused: {str(error).splitlines()[-1]}"
            print(f"{name}, round {number + 1}: {row.name} {skipped.get(row.name, 'done')}", flush=True)
    return seen, skipped


def report(name: str, rows: Sequence[Row], seen: Sequence[Seen], skipped: Mapping[str, str]) -> int:
    """Print the table; how many rows had other tokens than everything on."""
    differ = 0
    print(f"\n## {name}\n")
    print("row | requests at once | output tokens/s (spread) | worth | TTFT p50 ms | idle gap µs | tokens")
    print("--|--|--|--|--|--|--")
    levels = sorted({s.level for s in seen})
    for row in rows:
        if row.name in skipped:
            print(f"{row.name} | | {skipped[row.name]} | | | |")
            continue
        for level in levels:
            mine = [s for s in seen if (s.row, s.level) == (row.name, level)]
            full = [s for s in seen if (s.row, s.level) == (rows[0].name, level)]
            if not mine:
                continue
            same = {s.digest for s in mine} == {s.digest for s in full} and len({s.digest for s in mine}) == 1
            differ += not same
            rates = [s.tokens_per_s for s in mine]
            rate, base = statistics.median(rates), statistics.median(s.tokens_per_s for s in full)
            gaps = [s.gap_us for s in mine if s.gap_us is not None]
            worth = "" if row is rows[0] else f"{(base / rate - 1) * 100:+.1f} %"
            told = f" (report: {row.reported} %)" if row.reported else ""
            print(
                f"{row.name}{told} | {level} | {rate:.1f} ({min(rates):.1f}–{max(rates):.1f}) | {worth} | "
                f"{statistics.median(s.ttft_ms for s in mine):.1f} | "
                f"{f'{statistics.median(gaps):.0f}' if gaps else 'not told'} | {'same' if same else 'DIFFER'}"
            )
    return differ


def tiny_model(directory: Path) -> str:
    """Two layers with dummy weights: what is left when the maths costs nothing."""
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }  # fmt: skip
    write_hf_dir(directory, config, {}, tiny_assets(512))
    return str(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2", "qwen2.5-coder-0.5b", TINY])
    parser.add_argument("--levels", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--min-requests", type=int, default=4)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--platform", default="native")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("\n".join(f"{name}: {value}" for name, value in machine.describe().items()), flush=True)
    found, differ = {}, 0
    with tempfile.TemporaryDirectory() as directory:
        for number, name in enumerate(args.models):
            model = tiny_model(Path(directory) / TINY) if name == TINY else name
            rows = ROWS if number == 0 else tuple(row for row in ROWS if row.gains)
            seen, skipped = run_model(name, model, rows, args)
            found[name] = {"seen": [asdict(s) for s in seen], "skipped": skipped}
            differ += report(name, rows, seen, skipped)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    print("\nthe same tokens in every row" if not differ else f"\nFAILED: {differ} rows had other tokens")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
