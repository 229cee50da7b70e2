"""Flags of a command that starts an engine or a server: `--config`, the model, every setting."""

from __future__ import annotations

import argparse
from pathlib import Path

from xllm.config import env
from xllm.config.fields import settings
from xllm.config.flags import add_flags
from xllm.config.load import Loaded, load


def add_settings(
    parser: argparse.ArgumentParser,
    *sections: type,
    model: bool = True,
    skip: frozenset[str] = frozenset(),
) -> None:
    """`xllm COMMAND [MODEL] --config FILE --every-setting ...`, without flags for the settings in `skip`."""
    if model:
        parser.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    parser.add_argument("--config", type=Path, help="YAML or TOML file with `setting: value` lines")
    add_flags(parser, *sections, skip=skip)


def load_settings(args: argparse.Namespace, *sections: type) -> Loaded:
    """All layers merged; the positional model counts as the command line's."""
    known = settings(*sections)
    given = {name: value for name, value in vars(args).items() if name in known}
    if getattr(args, "model_name", None):
        given["model"] = args.model_name
    return load(*sections, file=args.config or env.config_file(), env=env.variables(), cli=given)
