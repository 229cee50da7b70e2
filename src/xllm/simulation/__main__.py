"""`python -m xllm.simulation`: many random schedules, or one again with all that happened.

python -m xllm.simulation --seeds 0:10000 --jobs 2
python -m xllm.simulation --seed 4711 --events --shrink
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections import Counter

from xllm.simulation.run import Report, run_schedule, run_seed
from xllm.simulation.schedule import make_schedule
from xllm.simulation.shrink import describe, shrink

PROGRESS_EVERY_S = 10.0
MAX_FAILED = 20


def main(argv: list[str] | None = None) -> int:
    """0 = every schedule ended well."""
    parser = argparse.ArgumentParser(prog="python -m xllm.simulation", description=__doc__)
    parser.add_argument("--seeds", default="0:1000", help="first:last+1")
    parser.add_argument("--jobs", type=int, default=1, help="processes; each takes a part of the seeds")
    parser.add_argument("--seed", type=int, default=None, help="run this one and print its schedule")
    parser.add_argument("--events", action="store_true", help="with --seed: print all that happened")
    parser.add_argument("--shrink", action="store_true", help="with --seed: make a failing schedule small")
    args = parser.parse_args(argv)
    # Engines die here by the thousand; what matters is in the report.
    logging.disable(logging.CRITICAL)
    if args.seed is not None:
        return one(args.seed, events=args.events, small=args.shrink)
    first, last = (int(part) for part in args.seeds.split(":"))
    if args.jobs > 1:
        return _in_parts(first, last, args.jobs)
    return many(range(first, last))


def many(seeds: range) -> int:
    """Run them all, print failing seeds and how fast it went."""
    started_s = told_s = time.monotonic()
    failed: list[int] = []
    codes: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    handovers: Counter[str] = Counter()
    for count, seed in enumerate(seeds, start=1):
        report = run_seed(seed)
        if report.wrong:
            failed.append(seed)
            print(f"FAILED {reproduce(report)}", flush=True)
            if len(failed) >= MAX_FAILED:
                print(f"gave up at seed {seed} after {MAX_FAILED} failures")
                break
        codes.update(report.error_codes)
        totals.update(
            requests=report.num_requests,
            completed=report.num_completed,
            faults=report.num_faults_hit,
            losses=report.num_losses,
            switches=report.num_switches,
            claimed_rows=report.num_claimed_rows,
            link_faults=report.num_link_faults_hit,
        )
        handovers.update({f"{reason} {outcome}": n for (reason, outcome), n in report.handovers.items()})
        now_s = time.monotonic()
        if now_s - told_s > PROGRESS_EVERY_S or count == len(seeds):
            told_s = now_s
            rate = count / max(now_s - started_s, 1e-9)
            print(
                f"{count}/{len(seeds)} from {seeds.start}: {rate:.1f} schedules/s, {len(failed)} failed",
                flush=True,
            )
    print(f"{dict(totals)}, ended otherwise: {dict(codes)}")
    print(f"hand-overs: {dict(handovers)}")
    return 1 if failed else 0


def reproduce(report: Report) -> str:
    """What went wrong and the command that shows it again."""
    return f"{report.wrong[0]}\n  python -m xllm.simulation --seed {report.seed} --events --shrink"


def one(seed: int, *, events: bool, small: bool) -> int:
    schedule = make_schedule(seed)
    report = run_schedule(schedule)
    if report.wrong and small:
        schedule = shrink(schedule, lambda s: bool(run_schedule(s).wrong))
    print(describe(schedule))
    report = run_schedule(schedule, on_line=print if events else None)
    for what in report.wrong:
        print(f"WRONG: {what}")
    print(f"digest {report.digest}, {report.virtual_s:.1f} virtual seconds")
    return 1 if report.wrong else 0


def _in_parts(first: int, last: int, jobs: int) -> int:
    """Processes of their own, since a schedule keeps one core busy."""
    size = -(-(last - first) // jobs)
    commands = [
        [sys.executable, "-m", "xllm.simulation", "--seeds", f"{start}:{min(start + size, last)}"]
        for start in range(first, last, size)
    ]
    processes = [subprocess.Popen(command) for command in commands]
    return max([process.wait() for process in processes], default=0)


if __name__ == "__main__":
    sys.exit(main())
