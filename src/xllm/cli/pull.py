"""`xllm pull NAME`: fetch a model now, so that `serve` needs no network later."""

from __future__ import annotations

import argparse
import sys

from xllm.artifacts.resolve import resolve


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_name", metavar="NAME", help="catalogue name (see `xllm list`) or hub id")
    parser.add_argument("--revision", help="hub revision")


def run(args: argparse.Namespace) -> int:
    source = resolve(args.model_name, revision=args.revision, progress=_tell)
    print(source.path)
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
