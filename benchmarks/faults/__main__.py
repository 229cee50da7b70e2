"""Kills (or stops) engines under streams and prints what the clients saw.

    python -m benchmarks.faults --kills 100
    python -m benchmarks.faults --stops 10 --stop-s 4

Exit code 1 when a stream broke or differed from its run without faults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
from pathlib import Path

from benchmarks.compare import machine
from benchmarks.faults import faults
from benchmarks.faults.report import summary
from benchmarks.faults.run import ENVIRONMENT, golden, killer, stopper, under_faults
from benchmarks.faults.streams import bodies
from xllm.testing.server_process import serve


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.faults")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--stop-s", type=float, default=4.0)
    parser.add_argument("--pause-s", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    flags = ("--max-model-len", "1024", "--instances", f"mixed:{args.instances}", "--log-level", "warning")
    result: dict[str, object] = {"machine": machine.describe(), "command": shlex.join(sys.argv[1:])}
    ok = True
    with serve(args.model, *flags, env=ENVIRONMENT) as server:
        faults.wait_ready(server.base_url, args.instances)
        asked = bodies(args.model, 48, args.seed)
        wanted = asyncio.run(golden(server.base_url, asked))
        kinds = [
            ("kill", args.kills, killer(server.base_url)),
            ("stop", args.stops, stopper(server.base_url, args.stop_s)),
        ]
        for name, count, inject in kinds:
            if not count:
                continue
            run = under_faults(
                server.base_url,
                asked,
                wanted,
                inject,
                num_faults=count,
                num_streams=args.streams,
                seed=args.seed,
                pause_s=args.pause_s,
            )
            outcome = asyncio.run(run)
            for line in outcome.problems()[:10]:
                print(line, file=sys.stderr)
            ok = ok and not outcome.problems()
            result[name] = summary(outcome) | moves(server.metrics())
            print(name, json.dumps(result[name], indent=2), flush=True)
            faults.wait_ready(server.base_url, args.instances)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if ok else 1


def moves(found: dict[str, float]) -> dict[str, float]:
    """What the front itself counted of suspicions, moves and detection."""
    words = ("move", "detect", "suspic", "death", "quarantine", "nonexact", "stale", "diverg", "restarts")
    return {
        name: value
        for name, value in sorted(found.items())
        if any(word in name for word in words) and "_bucket" not in name and "_created" not in name
    }


if __name__ == "__main__":
    sys.exit(main())
