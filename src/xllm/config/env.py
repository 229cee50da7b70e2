"""The only reader of the process environment. Everything else is handed plain values.

Two kinds of names exist: `XLLM_<FLAG>` for every flag (see `load`), and the few below that are no flag
because they are needed before or beside a configuration.
"""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = "XLLM_"

NOT_FLAGS = {
    "XLLM_CACHE_DIR": "for models and packed weights; default: $XDG_CACHE_HOME/xllm or ~/.cache/xllm",
    "XLLM_CONFIG": "configuration file when --config is not given",
}


def variables() -> dict[str, str]:
    """A copy of all variables that begin with XLLM_."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


def cache_dir() -> Path:
    """Directory for pulled models and packed weights. Not created here."""
    own = os.environ.get("XLLM_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "xllm"


def config_file() -> Path | None:
    """File named by XLLM_CONFIG, if any."""
    name = os.environ.get("XLLM_CONFIG")
    return Path(name).expanduser() if name else None


def engine_environment() -> dict[str, str]:
    """The environment for an engine process: this one's, with compute threads that soon sleep when they wait.

    Threads that spin at a barrier while the front, the detokeniser or another engine needs their core
    stretch a step up to a hundredfold; measured in docs/design/0003-engine-process.md. What the user
    has set wins.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return dict(os.environ)
    return {"GOMP_SPINCOUNT": "1000", **os.environ}


def become_engine() -> None:
    """Give this very process the environment of an engine; before any library with threads is loaded."""
    os.environ.update(engine_environment())
