"""`xllm COMMAND ...`: finds the command, turns errors into one line and an exit status.

Commands are modules that are imported when asked for, so that `xllm --help` needs no configuration
and `xllm list` no server. A command module has `HELP`, `configure(parser)` and `run(args) -> int`.

Exit status: 0 done, 1 failed while running, 2 wrong usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from xllm.config.flags import dashed
from xllm.errors import ConfigError, XllmError
from xllm.observability.logs import flush_logs
from xllm.version import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("xllm.cli.serve", "serve a model over the OpenAI API"),
    "service": ("xllm.cli.service", "serve what instances elsewhere have loaded"),
    "instance": ("xllm.cli.instance", "load a model for services elsewhere"),
    "chat": ("xllm.cli.chat", "talk to a model in the terminal"),
    "bench": ("xllm.cli.bench.command", "measure a server, or the engine alone"),
    "explain": ("xllm.cli.explain", "say why a request went where it went, and where its time was spent"),
    "doctor": ("xllm.cli.doctor", "say what works on this machine, and what does not and why"),
    "list": ("xllm.cli.models", "models that can be served by name"),
    "pull": ("xllm.cli.pull", "fetch a model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code. Output into a pipe whose reader has left ends the command without a traceback."""
    try:
        return _main(argv)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; it must not find the broken pipe there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(argv: Sequence[str] | None) -> int:
    words = dashed(list(sys.argv[1:] if argv is None else argv))
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"xllm {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"xllm: there is no command {words[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(words[0], words[1:])


def parser_for(name: str) -> tuple[argparse.ArgumentParser, Any]:
    """The parser and the module of a command; also read by the test that freezes the flags."""
    module_name, text = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"xllm {name}", description=text, allow_abbrev=False)
    module.configure(parser)
    return parser, module


def run_command(name: str, words: Sequence[str]) -> int:
    """Run it; an expected error is one line with its remedy, a bug keeps its traceback."""
    parser, module = parser_for(name)
    args = parser.parse_args(words)
    try:
        return int(module.run(args))
    except XllmError as error:
        flush_logs()
        if getattr(args, "log_level", None) == "debug":
            traceback.print_exc()
        print(f"xllm {name}: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: xllm COMMAND [flags]      (xllm COMMAND --help for its flags)",
            "",
            *lines,
            "",
            "Every flag can also stand in the environment as XLLM_<FLAG> or in a file given by --config.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
