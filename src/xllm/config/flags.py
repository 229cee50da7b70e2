"""Command-line flags made from the configuration dataclasses: one field, one flag, one help text.
Rarely changed settings have none and are set in the file.

Values stay text here; `load` converts them together with the other layers, so that a bad value reads
the same wherever it stood.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from xllm.config.aliases import ALIASES, NEGATED
from xllm.config.fields import Setting, settings


def add_flags(parser: argparse.ArgumentParser, *sections: type, skip: frozenset[str] = frozenset()) -> None:
    """One flag per field of `sections` that has one. Only flags that were given end up in the namespace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in settings(*sections).values():
        if setting.name in skip or not setting.has_flag:
            continue
        if setting.section not in groups:
            title = setting.section.removesuffix("Config").lower()
            groups[setting.section] = parser.add_argument_group(title)
        _add(groups[setting.section], setting)


def _add(group: argparse._ArgumentGroup, setting: Setting) -> None:
    common: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS}
    off = {**common, "action": "store_const", "const": "false"}
    if setting.kind is bool:
        common |= {"action": "store_const", "const": "true"}
    else:
        metavar = "{" + ",".join(setting.choices) + "}" if setting.choices else setting.kind.__name__.upper()
        common |= {"action": "append" if setting.many else "store", "metavar": metavar}
    text = f"{setting.help} {_default(setting)}".strip().replace("%", "%%")
    group.add_argument(setting.flag, help=text, **common)
    # Aliases and negations work but are not listed: help shows one name per setting.
    if aliases := _names(ALIASES, setting):
        group.add_argument(*aliases, help=argparse.SUPPRESS, **common)
    if setting.kind is bool:
        negations = ["--no-" + setting.flag[2:], *_names(NEGATED, setting)]
        group.add_argument(*negations, help=argparse.SUPPRESS, **off)


def _names(table: dict[str, str], setting: Setting) -> list[str]:
    return ["--" + name.replace("_", "-") for name, target in table.items() if target == setting.name]


def _default(setting: Setting) -> str:
    if setting.default in (None, (), ""):
        return ""
    shown = str(setting.default).lower() if setting.kind is bool else setting.default
    return f"[{shown}]"


def dashed(argv: Sequence[str]) -> list[str]:
    """`--max_num_seqs=4` → `--max-num-seqs=4`: underscores and dashes are the same in a flag's name."""
    result: list[str] = []
    for index, word in enumerate(argv):
        if word == "--":
            return result + list(argv[index:])
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        result.append(word)
    return result
