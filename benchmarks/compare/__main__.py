"""`python -m benchmarks.compare`: arguments, files and order of work; nothing is measured here."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import native_step
from benchmarks.compare import machine, perplexity, report
from benchmarks.compare.adapters import ADAPTERS, Context
from benchmarks.compare.load import Load, loads, prefills
from benchmarks.compare.process import end_in_order
from benchmarks.compare.rounds import Result, compare
from benchmarks.compare.settings import ENTRIES, Entry
from benchmarks.compare.weights import GGUF_TYPES, encode

RESULTS = Path("benchmarks/results")
CLASSES = [*GGUF_TYPES]
QUICK_MINUTES = 4.5
MARGIN = 64
"""Tokens of room beyond prompt and answer: the words of a prompt are not exactly as many tokens."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    add = made.add_argument
    add("--model", default="smollm2", help="catalogue name or GGUF file [%(default)s]")
    add(
        "--peers-dir", type=Path, default=Path(".peers"), help="where make bench-peers put them [%(default)s]"
    )
    add("--weights-dir", type=Path, help="where the encodings are kept [PEERS_DIR/weights]")
    add("--engines", nargs="+", choices=[*ADAPTERS], default=[*ADAPTERS], help="[all]")
    add("--weights", nargs="+", choices=CLASSES, default=CLASSES, help="[all]")
    add("--entries", nargs="+", choices=[e.name for e in ENTRIES], metavar="NAME", help="instead of both")
    add(
        "--skip",
        nargs="*",
        default=[],
        metavar="PATTERN",
        help='turns not worth their minutes, e.g. "llama.cpp * @ 32 in*"; the result names them',
    )
    add(
        "--shapes", nargs="+", type=shape, default=[(128, 64)], metavar="IN/OUT", help="words/tokens [128/64]"
    )
    add("--concurrency", nargs="*", type=int, default=[1, 8, 32], help="closed loops [1 8 32]")
    add("--prefill", nargs="*", type=batch, default=[], metavar="NxLEN", help="prompts, e.g. 8x128 1x1024")
    add("--rates", nargs="*", type=float, default=[], help="poisson requests/s, beside the closed loops")
    add("--num-requests", type=int, help="requests of a turn [8 at least; 300 at a rate]")
    add("--requests-per-slot", type=float, default=3.0, help="requests of a turn ÷ concurrency [3]")
    add("--rounds", type=int, default=3, help="rounds; medians want three or more [3]")
    add("--max-minutes", type=float, default=float("inf"), help="begin no round that would end later")
    add("--quick", action="store_true", help="under five minutes: fewer entries, concurrency 8, 32 tokens")
    add("--threads", type=int, default=machine.usable_cores(), help="of every engine [all cores]")
    add("--kv-gib", type=int, default=2, help="KV memory of every engine [2]")
    add("--ready-timeout", type=float, default=600.0, help="seconds an engine may take to start [600]")
    add("--xllm-flags", type=shlex.split, default=[], help='further flags of xllm, e.g. "--platform native"')
    add("--with-ceilings", action="store_true", help="measure the native step first: column 'of ceiling'")
    add("--ceilings", type=Path, help="JSON that benchmarks.native_step wrote, instead of measuring")
    add("--out", type=Path, default=RESULTS, help="[%(default)s]")
    return made


def shape(text: str) -> tuple[int, int]:
    input_len, slash, output_len = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{text}: write IN/OUT, e.g. 128/64")
    return int(input_len), int(output_len)


def batch(text: str) -> tuple[int, int]:
    num, cross, length = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text}: write NxLEN, e.g. 8x128")
    return int(num), int(length)


def chosen(args: argparse.Namespace) -> list[Entry]:
    if args.entries:
        return [entry for entry in ENTRIES if entry.name in args.entries]
    return [
        entry
        for entry in ENTRIES
        if entry.engine in args.engines and entry.weights in args.weights and (entry.quick or not args.quick)
    ]


def main() -> int:
    began = time.monotonic()
    end_in_order()
    args = parser().parse_args()
    if args.quick:
        args.shapes, args.concurrency, args.rates = [(128, 32)], [8], []
        args.num_requests = args.num_requests or 16
        args.max_minutes = min(args.max_minutes, QUICK_MINUTES)
    todo = loads(args.shapes, args.concurrency, args.rates, args.num_requests, args.requests_per_slot)
    todo += prefills(args.prefill)
    if not todo:
        raise SystemExit("nothing to measure: give --concurrency, --prefill or --rates")
    head = {
        "command": shlex.join(["python", "-m", "benchmarks.compare", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": args.model,
        **machine.describe(),
        "load average before": " ".join(f"{value:.2f}" for value in machine.load_average()),
    }
    weights_dir = args.weights_dir or args.peers_dir / "weights"
    ceilings = found_ceilings(args, weights_dir)
    context = Context(
        peers_dir=args.peers_dir,
        weights_dir=encode(args.model, weights_dir),
        num_threads=args.threads,
        max_seqs=max(load.concurrency or 64 for load in todo),
        max_len=max(load.input_len + load.output_len for load in todo) + MARGIN,
        kv_gib=args.kv_gib,
        xllm_flags=tuple(args.xllm_flags),
    )
    results, done = compare(
        chosen(args),
        todo,
        context,
        num_rounds=args.rounds,
        until_s=began + args.max_minutes * 60,
        ready_timeout_s=args.ready_timeout,
        logs=args.peers_dir / "logs",
        left_out=lambda entry, load: is_left_out(args.skip, entry, load),
        say=lambda line: print(f"[{time.monotonic() - began:6.1f} s] {line}", file=sys.stderr, flush=True),
    )
    write(args, head, results, todo, done, ceilings)
    return 1 if any(result.problem for result in results) else 0


def is_left_out(patterns: list[str], entry: Entry, load: Load) -> bool:
    return any(fnmatch.fnmatchcase(f"{entry.name} @ {load.name}", pattern) for pattern in patterns)


def found_ceilings(args: argparse.Namespace, weights_dir: Path) -> dict[str, Any]:
    """Measured now, before any engine runs, or read; {} when neither was asked for."""
    if args.ceilings:
        read: dict[str, Any] = json.loads(args.ceilings.read_text(encoding="utf-8"))
        return read
    if not args.with_ceilings:
        return {}
    classes = sorted({entry.weights for entry in chosen(args) if entry.engine == "xllm"}, key=CLASSES.index)
    found = native_step.ceilings(args.model, weights_dir, classes, args.threads, 3, native_step.BATCHES)
    print(native_step.table(found), file=sys.stderr)
    return found


def write(
    args: argparse.Namespace,
    head: dict[str, str],
    results: list[Result],
    todo: list[Load],
    done: int,
    ceilings: dict[str, Any],
) -> None:
    """Print the table and keep it, with every turn, under --out."""
    known = perplexity.known(args.out, args.model)
    text = report.markdown(head, results, todo, done, ceilings, known)
    if ceilings:
        text += f"\n## The native step alone, same run\n\n```\n{native_step.table(ceilings)}\n```\n"
    places = {".peers": args.peers_dir, "RESULTS": args.out}
    if args.ceilings:
        places["CEILINGS"] = args.ceilings
    text = machine.without_places(text, places)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    # No with_suffix: the names of models have dots of their own.
    stem = args.out / f"compare-{args.model.rpartition('/')[2]}-{head['date'][:19].replace(':', '')}"
    Path(f"{stem}.md").write_text(text, encoding="utf-8")
    raw: dict[str, Any] = {
        "head": head,
        "rounds": done,
        "warnings": report.warnings(results, done),
        "loads": [dataclasses.asdict(load) | {"name": load.name} for load in todo],
        "results": [dataclasses.asdict(result) | {"name": result.entry.name} for result in results],
        "perplexity": known,
        "ceilings": ceilings,
    }
    raw_text = machine.without_places(json.dumps(raw, indent=1), places)
    Path(f"{stem}.json").write_text(raw_text + "\n", encoding="utf-8")
    print(f"written: {stem}.md and .json")


if __name__ == "__main__":
    sys.exit(main())
