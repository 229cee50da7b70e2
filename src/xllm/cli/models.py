"""`xllm list`: the models that can be served by name, and which of them are on this machine."""

from __future__ import annotations

import argparse

from xllm.artifacts.resolve import list_models
from xllm.config.report import gib


def configure(parser: argparse.ArgumentParser) -> None:
    """No flags."""


def run(args: argparse.Namespace) -> int:
    for model in list_models():
        where = f"pulled: {model.path}" if model.path else f"not here yet: xllm pull {model.name}"
        names = ", ".join((model.name, *model.aliases))
        print(f"{names}\n    {model.description} ({model.licence}, {gib(model.size_bytes)})\n    {where}")
    print("A model may also be a Hugging Face directory, a .gguf file, or a hub id (owner/name).")
    return 0
