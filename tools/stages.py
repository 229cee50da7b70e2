"""Runs the stages of `make test` one after the other, prints the seconds of each and the total.

Every stage has a budget for two cores; all of them together stay within ten minutes. A stage over
its budget is printed as such and does not fail: a slow machine is no bug. All stages run even when
an early one fails, so that one run shows everything that is wrong.

    python tools/stages.py [STAGE ...]      default: all, in this order
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_BUDGET_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    budget_s: int
    command: tuple[str, ...]


def _pytest(folder: str, *extra: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", f"tests/{folder}", "-q", "-m", "not robustness", *extra)


BIN = Path(sys.executable).parent

STAGES = (
    Stage(name="ruff", budget_s=3, command=(str(BIN / "ruff"), "check", ".")),
    Stage(name="mypy", budget_s=35, command=(str(BIN / "mypy"),)),
    Stage(name="contracts", budget_s=2, command=(str(BIN / "lint-imports"), "--verbose")),
    # Two workers: these tests are single-threaded Python. The other stages own both cores themselves.
    Stage(name="null", budget_s=90, command=_pytest("null", "-n", "2")),
    Stage(name="reference", budget_s=130, command=_pytest("reference")),
    Stage(name="native", budget_s=135, command=_pytest("native")),
    # By file, since a file's tests share a server. They wait for faults more than they compute.
    Stage(name="integration", budget_s=200, command=_pytest("integration", "-n", "2", "--dist", "loadfile")),
)


def environment() -> dict[str, str]:
    """A test run must not depend on the caller's XLLM_ settings; hubs are never asked."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("XLLM_")}
    kept = {key: os.environ[key] for key in ("XLLM_CACHE_DIR",) if key in os.environ}
    return env | kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}


def run(stage: Stage, env: dict[str, str]) -> tuple[int, float]:
    print(f"\n== {stage.name}: {' '.join(stage.command[:1])} {' '.join(stage.command[1:])}", flush=True)
    started = time.monotonic()
    code = subprocess.run(stage.command, cwd=ROOT, env=env, check=False).returncode
    return code, time.monotonic() - started


def report(rows: list[tuple[Stage, int, float]]) -> None:
    print("\n== stages (seconds, budget)")
    for stage, code, seconds in rows:
        verdict = "ok" if code == 0 else "FAILED"
        _line(stage.name, seconds, stage.budget_s, verdict)
    _line("total", sum(seconds for _, _, seconds in rows), TOTAL_BUDGET_S, "")


def _line(name: str, seconds: float, budget_s: int, verdict: str) -> None:
    late = "over budget" if seconds > budget_s else ""
    print(f"  {name:<12} {seconds:7.1f} {budget_s:5d}  {verdict} {late}".rstrip())


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - {stage.name for stage in STAGES})
    if unknown:
        print(f"unknown stages {unknown}; there are {[stage.name for stage in STAGES]}", file=sys.stderr)
        return 2
    env = environment()
    chosen = [stage for stage in STAGES if not names or stage.name in names]
    rows = [(stage, *run(stage, env)) for stage in chosen]
    report(rows)
    return 1 if any(code for _, code, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
