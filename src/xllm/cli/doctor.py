"""`xllm doctor [MODEL]`: what works on this machine, and what does not and why.

Looks and reports; changes nothing and touches no network. Exit status 1 when nothing could serve.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from xllm.artifacts.resolve import resolve
from xllm.config import EngineConfig, ModelConfig, env
from xllm.config.report import gib
from xllm.engine.platform.registry import survey
from xllm.errors import ConfigError
from xllm.version import __version__

PACKAGES = ("msgspec", "numpy", "tokenizers", "jinja2", "gguf", "safetensors", "huggingface_hub", "torch")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_name", nargs="?", metavar="MODEL", help="also say whether this model can be served"
    )


def run(args: argparse.Namespace) -> int:
    for title, lines in (
        ("machine", machine()),
        ("packages", packages()),
        ("memory and disk", memory()),
        ("settings", settings_lines()),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")
    usable = _platforms(args.model_name)
    model_ok = _model(args.model_name) if args.model_name else True
    return 0 if usable and model_ok else 1


def machine() -> Iterator[str]:
    yield f"xllm {__version__}, Python {platform.python_version()} at {sys.executable}"
    yield f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"
    if flags := cpu_flags():
        shown = [
            flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in flags
        ]
        yield f"vector units: {', '.join(shown) or 'baseline only'}"


def cpu_flags() -> frozenset[str]:
    """Feature names of the first core; empty where the kernel does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def packages() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            remedy = (
                "make setup, or python tools/install_torch.py" if name == "torch" else f"pip install {name}"
            )
            yield f"{name} is missing: {remedy}"


def memory() -> Iterator[str]:
    available = available_bytes()
    if available is not None:
        yield f"memory available: {gib(available)}"
    cache = env.cache_dir()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    yield f"models are kept in {cache} ({gib(shutil.disk_usage(existing).free)} free)"


def available_bytes() -> int | None:
    """Memory that can be had without swapping, or None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def settings_lines() -> Iterator[str]:
    """Names only: a value may be a key."""
    names = sorted(env.variables())
    yield f"environment: {', '.join(names)}" if names else "environment: no XLLM_ variable is set"


def _platforms(model: str | None) -> bool:
    config = EngineConfig(model=ModelConfig(model=model or ""))
    print("platforms")
    usable = False
    for name, reasons in survey(config).items():
        usable = usable or (not reasons and name != "null")
        print(f"  {name}: {'can be used' if not reasons else 'no: ' + '; '.join(reasons)}")
    return usable


def _model(name: str) -> bool:
    print(f"model {name}")
    try:
        source = resolve(name, allow_pull=False)
        arch = source.arch()
    except ConfigError as error:
        print(f"  {error.message}")
        return False
    print(f"  {source.kind} at {source.path}")
    print(
        f"  {arch.name}: {arch.num_layers} layers, hidden {arch.hidden_size}, {arch.num_heads} heads / "
        f"{arch.num_kv_heads} KV heads, vocabulary {arch.vocab_size}, context {arch.max_position} tokens"
    )
    return True
