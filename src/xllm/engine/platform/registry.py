"""Finds platforms by name and says why one was chosen or refused.

What xLLM brings stands in a literal table; others come from the entry-point group `xllm.platforms`.
Platforms are imported when asked for, since theirs is the only code that needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from xllm.arch import ArchConfig
from xllm.config.schema import EngineConfig
from xllm.engine.platform.base import Platform
from xllm.engine.platform.host import no_cuda_driver
from xllm.errors import ConfigError

GROUP = "xllm.platforms"

BUILT_IN = {
    "cuda": "xllm.engine.platform.cuda:PLATFORM",
    "cpu": "xllm.engine.platform.cpu:PLATFORM",
    "native": "xllm.engine.platform.native:PLATFORM",
    "null": "xllm.engine.platform.null:PLATFORM",
}

_AUTO = ("cuda", "native", "cpu")
"""Tried in this order; `null` computes nothing and is never chosen on its own."""

_SIGNS: dict[str, Callable[[], str | None]] = {"cuda": no_cuda_driver}
"""Why a platform need not even be imported when nobody asked for it: torch takes a second and 200 MiB."""

# Not "pip install xllm[torch]": on Linux that takes the build with gigabytes of CUDA libraries.
_TORCH_REMEDY = "`make test-setup` brings it, or install torch 2.13.0 (without a GPU its build 2.13.0+cpu)"


def platform_names() -> tuple[str, ...]:
    """All names that `--platform` accepts, beside auto."""
    return tuple(dict.fromkeys((*BUILT_IN, *(e.name for e in entry_points(group=GROUP)))))


def select_platform(config: EngineConfig, arch: ArchConfig) -> tuple[Platform, tuple[str, ...]]:
    """The platform to use, and report lines with the reasons. Raises ConfigError if none can serve."""
    asked = config.platform.platform
    names = _AUTO if asked == "auto" else (asked,)
    refused: list[str] = []
    for name in names:
        hopeless = _SIGNS[name]() if asked == "auto" and name in _SIGNS else None
        platform, reasons = _load(name) if hopeless is None else (None, (hopeless,))
        if platform is not None:
            reasons = platform.why_not(config, arch)
        if platform is not None and not reasons:
            why = "as asked" if asked == name else "first that can serve"
            return platform, (f"platform={name}: {why}", *refused)
        refused.append(f"platform {name} refused: {'; '.join(reasons)}")
    raise ConfigError(
        f"platform={asked}: {' | '.join(refused)}; known platforms: {', '.join(platform_names())}",
        param="platform",
    )


def survey(config: EngineConfig, arch: ArchConfig) -> dict[str, tuple[str, ...]]:
    """Every known platform with its reasons why it cannot run the model; empty = it can."""
    found: dict[str, tuple[str, ...]] = {}
    for name in platform_names():
        platform, reasons = _load(name)
        found[name] = reasons if platform is None else platform.why_not(config, arch)
    return found


def _load(name: str) -> tuple[Platform | None, tuple[str, ...]]:
    """(platform, ()) or (None, reasons)."""
    if name in BUILT_IN:
        entry = EntryPoint(name=name, value=BUILT_IN[name], group=GROUP)
    else:
        outside = {e.name: e for e in entry_points(group=GROUP)}
        if name not in outside:
            return None, ("no platform of this name is installed",)
        entry = outside[name]
    try:
        return cast(Platform, entry.load()), ()
    except ImportError as error:
        if error.name != "torch":
            raise
        return None, (f"torch is not installed; {_TORCH_REMEDY}",)
