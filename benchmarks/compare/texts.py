"""Two texts that every machine with this Python has: prose about a language, and code in it.

They depend on the Python version, so the hash is printed; comparisons are paired and made in one run.
"""

from __future__ import annotations

import hashlib
import inspect
import types
from importlib import import_module

CODE_MODULES = (
    "argparse", "ast", "calendar", "cmd", "codecs", "configparser", "copy", "csv", "difflib", "email.message",
    "enum", "fractions", "heapq", "html.parser", "imaplib", "inspect", "json.decoder", "logging", "mailbox",
)  # fmt: skip


def prose() -> str:
    """The language reference as `help()` prints it."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def code() -> str:
    """Sources of the standard library, docstrings included."""
    modules: list[types.ModuleType] = [import_module(name) for name in CODE_MODULES]
    return "\n\n".join(inspect.getsource(module) for module in modules)


def both() -> dict[str, str]:
    return {"prose": prose(), "code": code()}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
