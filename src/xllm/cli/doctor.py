"""`xllm doctor [MODEL] [settings of serve]`: what works on this machine, and what does not and why.

With a model also what `xllm serve` with the same settings would take of memory, by the plan that the engine
itself begins with. Looks and reports; loads no weight, changes nothing and touches no network. Exit status 1
when nothing could serve, or this model could not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

from xllm.arch import ArchConfig
from xllm.artifacts.resolve import resolve
from xllm.cli.room import with_room
from xllm.cli.serving import SECTIONS
from xllm.cli.settings import add_settings, load_settings
from xllm.config import ClusterConfig, EngineConfig, ModelConfig, env
from xllm.config.instances import parse_instances
from xllm.config.load import Loaded
from xllm.config.report import gib
from xllm.engine.build import plan_memory
from xllm.engine.platform import host
from xllm.engine.platform.registry import survey
from xllm.engine.platform.room import available_bytes
from xllm.errors import ConfigError
from xllm.version import __version__

PACKAGES = ("msgspec", "numpy", "tokenizers", "jinja2", "gguf", "safetensors", "huggingface_hub", "torch")

COMPUTES_NOTHING = "null"

# Stands in for a model when none is named: a platform must at least take the plainest one.
PLAINEST = ArchConfig(
    name="llama",
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=256,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=2048,
    tie_word_embeddings=True,
    layer_windows=(None,),
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, *SECTIONS)


def run(args: argparse.Namespace) -> int:
    _show("machine", machine())
    _show("packages", packages())
    _show("memory and disk", memory())
    _show("settings", settings_lines())
    loaded = load_settings(args, *SECTIONS)
    config = loaded.build(EngineConfig)
    arch: ArchConfig | None = PLAINEST
    if config.model.model:
        arch, facts = model_facts(config.model)
        _show(f"model {config.model.model}", facts)
    reasons = survey(config, arch or PLAINEST)
    _show("platforms", (f"{name}: {_verdict(why)}" for name, why in reasons.items()))
    usable = any(not why for name, why in reasons.items() if name != COMPUTES_NOTHING)
    if not usable or arch is None:
        return 1
    fits = True
    if config.model.model:
        told, fits = memory_facts(loaded)
        _show("memory that `xllm serve` with these settings takes", told)
    return 0 if fits else 1


def memory_facts(loaded: Loaded) -> tuple[list[str], bool]:
    """(the plan that an engine would begin with, or why it would not; whether it fits)."""
    loaded, why = with_room(loaded)
    config = loaded.build(EngineConfig)
    engines = sum(parse_instances(loaded.build(ClusterConfig).instances).values())
    sharing = replace(config.platform, num_local_instances=max(engines, config.platform.num_local_instances))
    try:
        plan = plan_memory(replace(config, platform=sharing))
    except ConfigError as error:
        return [why, *error.message.splitlines()], False
    return [why, *(["the platform does not say"] if plan is None else plan.lines())], True


def _show(title: str, lines: Iterable[str]) -> None:
    print(title)
    for line in lines:
        print(f"  {line}")


def _verdict(reasons: tuple[str, ...]) -> str:
    return f"no: {'; '.join(reasons)}" if reasons else "can be used"


def machine() -> Iterator[str]:
    yield f"xllm {__version__}, Python {platform.python_version()} at {sys.executable}"
    yield f"{platform.system()} {platform.release()} {platform.machine()}, {host.num_cores()} cores"
    yield f"vector units: {host.isa()}"


def packages() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            remedy = (
                "make test-setup, or python tools/install_torch.py"
                if name == "torch"
                else f"pip install {name}"
            )
            yield f"{name} is missing: {remedy}"


def memory() -> Iterator[str]:
    yield f"memory available: {gib(available_bytes())}"
    cache = env.cache_dir()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    yield f"models are kept in {cache} ({gib(shutil.disk_usage(existing).free)} free)"


def settings_lines() -> Iterator[str]:
    """Names only: a value may be a key."""
    names = sorted(env.variables())
    yield f"environment: {', '.join(names)}" if names else "environment: no XLLM_ variable is set"


def model_facts(config: ModelConfig) -> tuple[ArchConfig | None, list[str]]:
    """What the model is, or None and why it cannot be read."""
    try:
        source = resolve(
            config.model, revision=config.revision, load_format=config.load_format, seed=config.seed,
            allow_pull=False,
        )  # fmt: skip
        arch = source.arch()
    except ConfigError as error:
        return None, [error.message]
    return arch, [
        f"{source.kind} at {source.path}",
        f"{arch.name}: {arch.num_layers} layers, hidden {arch.hidden_size}, {arch.num_heads} heads / "
        f"{arch.num_kv_heads} KV heads, vocabulary {arch.vocab_size}, context {arch.max_position} tokens",
    ]
