"""`xllm serve` with the paced engine in place of a real one; every other part is what a user runs."""

from __future__ import annotations

import sys

from xllm.cli.main import main
from xllm.service.instances import local


def run(argv: list[str]) -> int:
    """`argv`: milliseconds of a step, then arguments of `xllm serve`."""
    local.PROGRAM = ("-m", "benchmarks.overhead.paced", "--step-ms", argv[0])
    return main(["serve", "paced", "--port", "0", "--log-level", "warning", *argv[1:]])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
