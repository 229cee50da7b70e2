"""`xllm bench serve|throughput|latency`: picks the measurement; each is a module of its own."""

from __future__ import annotations

import argparse

from xllm.cli.bench import offline, online


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="measure", required=True, metavar="{serve,throughput,latency}")
    online.configure(
        commands.add_parser(
            "serve", help="load an OpenAI-compatible server and measure it", allow_abbrev=False
        )
    )
    offline.configure_throughput(
        commands.add_parser("throughput", help="tokens a second of the engine alone", allow_abbrev=False)
    )
    offline.configure_latency(
        commands.add_parser("latency", help="seconds of one batch of the engine alone", allow_abbrev=False)
    )


def run(args: argparse.Namespace) -> int:
    return int(args.measurement(args))
