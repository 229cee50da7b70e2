"""Servers for fault tests: the null device behind real processes, paced, with the failpoints loaded.

Tokens of the null device are hashes of all KV that a row sees, so a wrong page or a lost token shows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.faultlab.outside import xllm_faultlab as marks
from xllm.artifacts.write import write_hf_dir
from xllm.testing.server_process import ServerProcess, serve
from xllm.testing.tiny_tokenizer import tiny_assets

OUTSIDE = Path(__file__).parent / "outside"
MODEL = "lab"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def model_dir(folder: Path) -> Path:
    """A model of a few kilobytes that the null platform can serve."""
    target = folder / MODEL
    if not target.exists():
        write_hf_dir(target, CONFIG, {"unused": np.zeros((1,), np.float32)}, tiny_assets(512))
    return target


def flags(folder: Path) -> tuple[str, ...]:
    return (
        str(model_dir(folder)), "--load-format", "dummy", "--platform", "null", "--served-model-name", MODEL,
        "--num-pages", "256", "--logits-processors", "faultlab",
    )  # fmt: skip


def environment(pace_ms: float = 0.0, **settings: Any) -> dict[str, str]:
    """For server processes; `settings` are configuration fields by name.

    Unless they say otherwise nobody is refused for a long queue: these tests are about other things, and a
    busy machine must not decide them.
    """
    settings = {"max_queue_delay_s": 0, **settings}
    more = {f"XLLM_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, "PYTHONPATH": _python_path(), "FAULTLAB_PACE_MS": str(pace_ms), **more}


def _python_path() -> str:
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(OUTSIDE), *([given] if given else [])])


@contextlib.contextmanager
def lab(
    folder: Path, *args: str, instances: int = 3, pace_ms: float = 0.0, **settings: Any
) -> Iterator[ServerProcess]:
    """`xllm serve` over `instances` null engines; each draw takes `pace_ms`."""
    env = environment(pace_ms, **settings)
    with serve(*flags(folder), "--instances", f"mixed:{instances}", *args, env=env) as server:
        yield server


def marked(kind: int, offset: int) -> int:
    """The seed that makes the failpoint `kind` of `xllm_faultlab` go off at an output offset."""
    return kind * marks.MILLION + offset


def body(prompt: str, *, max_tokens: int = 40, seed: int = 1, **fields: Any) -> dict[str, Any]:
    """A streamed completion whose answer is a value: greedy but for the seed's mark."""
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "seed": seed,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
