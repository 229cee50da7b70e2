"""The headline: the highest Poisson rate at which an engine keeps its word to readers, searched for.

    python -m benchmarks.compare.rates --entries "xllm bf16" "vllm bf16" --minutes-per-engine 8

One engine at a time, alone on the machine. Short probes on a grid of 8 %, then 300 requests that confirm
the rate or step down; a limit whose confirmation did not fit into the minutes says so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.compare import machine, perplexity
from benchmarks.compare.__main__ import MARGIN, RESULTS, shape
from benchmarks.compare.adapters import Context
from benchmarks.compare.limits import MIN_CONFIRMING, Promise, Reading
from benchmarks.compare.load import Load
from benchmarks.compare.process import EngineFailed, end_in_order
from benchmarks.compare.report import table
from benchmarks.compare.rounds import Result, Running, Say, begin, settle, warm_up
from benchmarks.compare.search import Found, Search, index_of, rate_of
from benchmarks.compare.settings import ENTRIES, Entry
from benchmarks.compare.weights import encode

LIMITS_MS = (50.0, 100.0, 30.0)
"""In the order in which they are searched for: time may run out."""

HEADLINE = ("xllm bf16", "xllm q4_1", "vllm bf16", "llama.cpp q4_0", "openvino q4_1 (in process)")
STARTS = {"xllm": 4.0, "vllm": 1.95, "llama.cpp": 1.5, "openvino": 2.0}
"""Requests/s at 128/64 where a search begins; only its length depends on them."""

SETTLE_S = 20.0
"""An overloaded engine may first have to notice that its clients have left."""


@dataclass(slots=True, kw_only=True)
class Column:
    """One engine at one shape. `readings` in the order in which they were taken."""

    entry: Entry
    lens: tuple[int, int]
    found: list[Found] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    strangers_cores: float = 0.0
    problem: str = ""
    about: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Meter:
    """Takes one reading; the `run` of a `Search`."""

    running: Running
    column: Column
    until_s: float
    say: Say

    def __call__(self, index: int, promise: Promise) -> Reading | None:
        rate = rate_of(index)
        if time.monotonic() + promise.num_requests / rate > self.until_s:
            return None
        input_len, output_len = self.column.lens
        load = Load(input_len=input_len, output_len=output_len, num_requests=promise.num_requests, rate=rate)
        # The number of a round only chooses prompts and arrivals: no prompt is asked for twice.
        asks, at_s = load.round(len(self.column.readings))
        settle([self.running], SETTLE_S)
        engine = self.running.engine
        cpu, used_s, began = machine.CpuTimes.now(), engine.tree.cpu_s(), time.monotonic()
        outcomes = engine.measure(asks, at_s, None, promise)
        strangers_s = machine.CpuTimes.now().strangers_s(cpu, engine.tree.cpu_s() - used_s)
        strangers = strangers_s / (time.monotonic() - began)
        self.column.strangers_cores = max(self.column.strangers_cores, strangers)
        reading = Reading.of(index, promise, outcomes)
        self.column.readings.append(reading)
        tpot_ms, ttft_ms = reading.p99_ms()
        self.say(
            f"{self.column.entry.name}: {rate:g} requests/s, {len(outcomes)} of {len(asks)} requests, "
            f"p99 TPOT {tpot_ms:.0f} ms, TTFT {ttft_ms:.0f} ms: {promise.tpot_s * 1e3:.0f} ms "
            f"{'kept' if reading.keeps(promise.tpot_s) else 'not kept'}"
        )
        return reading


def search(column: Column, running: Running, args: argparse.Namespace, say: Say) -> None:
    """Fill in the column; what was found before an engine went stays."""
    minutes = args.minutes_per_engine
    meter = Meter(running=running, column=column, until_s=time.monotonic() + minutes * 60, say=say)
    # Work per request, against the shape for which the starting points are known.
    work = (column.lens[0] / 10 + column.lens[1]) / (128 / 10 + 64)
    start = args.start or STARTS[column.entry.engine] / work
    made = Search(run=meter, start=index_of(start), num_probe=args.probe, num_confirm=args.confirm)
    try:
        for limit_ms in args.limits:
            found = made.find(limit_ms * 1e-3)
            column.found.append(found)
            say(f"{column.entry.name}: p99 TPOT ≤ {limit_ms:g} ms: {cell(found)}")
    except EngineFailed as error:
        column.problem = f"ended while measured: {error}"
        say(f"{column.entry.name}: {column.problem}")


def cell(found: Found) -> str:
    if found.reading is None:
        return "none" if found.ended else "not found in time"
    tpot_ms, ttft_ms = found.reading.p99_ms()
    sure = "" if found.reading.confirms else ", not confirmed"
    sure = sure if found.ended or not found.reading.confirms else ", perhaps more"
    return f"{found.rate:g} ({found.reading.num_requests} requests: {tpot_ms:.0f} / {ttft_ms:.0f} ms{sure})"


def markdown(
    head: dict[str, str], columns: Sequence[Column], known: dict[str, str], limits: list[float]
) -> str:
    lines = ["# Highest Poisson rate with p99 TPOT within limits", ""]
    lines += [f"* {name}: {value}" for name, value in head.items()]
    lines += ["", *warnings(columns)]
    lines += [
        "",
        "TPOT = (E2E − TTFT) ÷ (tokens − 1); p99 TTFT ≤ 2 s as well. Cells: requests/s (p99 of both).",
        "Grid of 8 %; engines alone, one after the other.",
    ]
    for lens in dict.fromkeys(column.lens for column in columns):
        of_shape = [column for column in columns if column.lens == lens]
        names = ("engine", *(f"≤ {limit:g} ms" for limit in sorted(limits)), "perplexity of these weights")
        rows = [(column.entry.name, *_cells(column, limits), _quality(column, known)) for column in of_shape]
        lines += ["", f"## {lens[0]} in / {lens[1]} out", "", *table((names, *rows)), "", *ratios(of_shape)]
    lines += ["", "## Engines", ""]
    lines += [
        f"* {c.entry.name}: {'; '.join(f'{k} {v}' for k, v in c.about.items())}" for c in columns if c.about
    ]
    return "\n".join(lines) + "\n"


def _cells(column: Column, limits: list[float]) -> list[str]:
    by_limit = {round(found.tpot_s * 1e3): cell(found) for found in column.found}
    return [by_limit.get(round(limit), "missing") for limit in sorted(limits)]


def _quality(column: Column, known: dict[str, str]) -> str:
    return known.get(column.entry.weights, "not measured")


def ratios(columns: Sequence[Column]) -> list[str]:
    """Each of our rates over the peers', by limit."""
    lines: list[str] = []
    for ours in columns:
        for theirs in columns:
            if ours.entry.engine != "xllm" or theirs.entry.engine == "xllm":
                continue
            rates = {found.tpot_s: found.rate for found in theirs.found if found.rate}
            told = [
                f"{found.tpot_s * 1e3:.0f} ms {found.rate / rates[found.tpot_s]:.2f}"
                for found in sorted(ours.found, key=lambda found: found.tpot_s)
                if found.rate and found.tpot_s in rates
            ]
            if told:
                lines.append(f"* {ours.entry.name} ÷ {theirs.entry.name}: {', '.join(told)}")
    return lines


def warnings(columns: Sequence[Column]) -> list[str]:
    lines = [
        f"**INCOMPLETE: {c.entry.name}: {c.problem.splitlines()[0][:200]}**" for c in columns if c.problem
    ]
    loud = max((column.strangers_cores for column in columns), default=0.0)
    if loud > 0.1:
        lines.append(f"**NOT QUIET: other programs took up to {loud:.2f} cores during a run**")
    if any(not (f.reading and f.reading.confirms) and f.rate for c in columns for f in c.found):
        lines.append("**PROVISIONAL: some rates were not confirmed with 300 requests**")
    return lines


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.compare.rates", description=__doc__)
    add = made.add_argument
    names = [entry.name for entry in ENTRIES]
    add("--model", default="smollm2", help="catalogue name or GGUF file [%(default)s]")
    add("--peers-dir", type=Path, default=Path(".peers"))
    add(
        "--entries", nargs="+", choices=names, default=HEADLINE, metavar="NAME", help=f"of {', '.join(names)}"
    )
    add("--shapes", nargs="+", type=shape, default=[(128, 64)], metavar="IN/OUT", help="[128/64]")
    add("--limits", nargs="+", type=float, default=list(LIMITS_MS), metavar="MS", help="in order of search")
    add("--minutes-per-engine", type=float, default=8.0, help="of each shape, without starting it [8]")
    add("--probe", type=int, default=64, help="requests of a probe [64]")
    add("--confirm", type=int, default=MIN_CONFIRMING, help=f"requests that confirm [{MIN_CONFIRMING}]")
    add("--start", type=float, help="requests/s where the search begins [what was seen before]")
    add("--max-seqs", type=int, default=64)
    add("--threads", type=int, default=machine.usable_cores())
    add("--kv-gib", type=int, default=2)
    add("--ready-timeout", type=float, default=600.0)
    add("--xllm-flags", type=shlex.split, default=[])
    add("--out", type=Path, default=RESULTS)
    return made


def main() -> int:
    began = time.monotonic()
    end_in_order()
    args = parser().parse_args()
    head = {
        "command": shlex.join(["python", "-m", "benchmarks.compare.rates", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": args.model,
        **machine.describe(),
        "load average before": " ".join(f"{value:.2f}" for value in machine.load_average()),
    }
    context = Context(
        peers_dir=args.peers_dir,
        weights_dir=encode(args.model, args.peers_dir / "weights"),
        num_threads=args.threads,
        max_seqs=args.max_seqs,
        max_len=max(sum(lens) for lens in args.shapes) + MARGIN,
        kv_gib=args.kv_gib,
        xllm_flags=tuple(args.xllm_flags),
    )

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {line}", file=sys.stderr, flush=True)

    columns: list[Column] = []
    for entry in (entry for entry in ENTRIES if entry.name in args.entries):
        columns += of_engine(entry, context, args, say)
        # After every engine: an hour's work is not lost with the last one.
        write(args, head, columns)
    print(markdown(head, columns, perplexity.known(args.out, args.model), args.limits))
    return 1 if any(column.problem for column in columns) else 0


def of_engine(entry: Entry, context: Context, args: argparse.Namespace, say: Say) -> list[Column]:
    columns = [Column(entry=entry, lens=lens) for lens in args.shapes]
    result = Result(entry=entry)
    with ExitStack() as stack:
        running = begin(result, context, args.ready_timeout, args.peers_dir / "logs", stack, say)
        for column in columns:
            column.about, column.problem = result.about, result.problem
            if running is None:
                continue
            input_len, output_len = column.lens
            first = Load(input_len=input_len, output_len=output_len, num_requests=16, concurrency=16)
            warm_up([running], [first], say)
            search(column, running, args, say)
    return columns


def write(args: argparse.Namespace, head: dict[str, str], columns: Sequence[Column]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    # No with_suffix: the names of models have dots of their own.
    stem = args.out / f"rates-{args.model.rpartition('/')[2]}-{head['date'][:19].replace(':', '')}"
    text = markdown(head, columns, perplexity.known(args.out, args.model), args.limits)
    places = {".peers": args.peers_dir, "RESULTS": args.out}
    Path(f"{stem}.md").write_text(machine.without_places(text, places), encoding="utf-8")
    raw: dict[str, Any] = {
        "head": head,
        "columns": [asdict(column) | {"name": column.entry.name} for column in columns],
    }
    raw_text = machine.without_places(json.dumps(raw), places)
    Path(f"{stem}.json").write_text(raw_text + "\n", encoding="utf-8")
    print(f"written: {stem}.md and .json", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
