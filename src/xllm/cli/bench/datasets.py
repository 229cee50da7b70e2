"""What is asked: prompts and output lengths, made from a seed or read from a file.

Random prompts are runs of common words, so that they work against any server; how many tokens they
are is what the server's usage says, and the report counts those.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from xllm.errors import ConfigError

_COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city name team "
    "minute idea body back face level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education "
)
WORDS = _COMMON_WORDS.split()

TRACE_BLOCK_LEN = 512
"""Tokens that one hash id of a Mooncake trace stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request to send. `at_s` is the recorded arrival time, for traces only."""

    prompt: str
    output_len: int
    at_s: float | None = None


def random_prompts(num: int, input_len: int, output_len: int, rng: np.random.Generator) -> list[Ask]:
    """`num` different prompts of `input_len` words each."""
    if input_len < 1 or output_len < 1:
        raise ConfigError(f"input length {input_len} and output length {output_len} must be at least 1")
    return [Ask(prompt=_words(input_len, rng), output_len=output_len) for _ in range(num)]


def _words(num: int, rng: np.random.Generator) -> str:
    return " ".join(WORDS[index] for index in rng.integers(0, len(WORDS), size=num))


def custom(path: Path, num: int, output_len: int) -> list[Ask]:
    """One JSON object per line: `prompt` (text) and optionally `output_len`. Repeats when too short."""
    rows = [_object(line, number, path) for number, line in _lines(path)]
    if not rows:
        raise ConfigError(f"{path.name} holds no prompts")
    asks = []
    for number, row in enumerate(rows, start=1):
        prompt, length = row.get("prompt"), row.get("output_len", row.get("max_tokens", output_len))
        if not isinstance(prompt, str) or not isinstance(length, int) or length < 1:
            raise ConfigError(
                f"{path.name}, entry {number}: needs a text `prompt` and, if given, a positive `output_len`"
            )
        asks.append(Ask(prompt=prompt, output_len=length))
    return [asks[index % len(asks)] for index in range(num)]


def trace(path: Path, num: int, rng: np.random.Generator) -> list[Ask]:
    """Recorded arrivals and lengths: Azure's csv or Mooncake's jsonl; the first `num` rows.

    Equal hash ids of a Mooncake trace become equal text, so that prefix reuse is as recorded.
    """
    rows = _mooncake(path) if path.suffix == ".jsonl" else _azure(path)
    asks = []
    for (at_s, input_len, output_len, hashes), _ in zip(rows, range(num), strict=False):
        prompt = _shared(hashes, input_len) if hashes else _words(max(1, input_len), rng)
        asks.append(Ask(prompt=prompt, output_len=max(1, output_len), at_s=at_s))
    if not asks:
        raise ConfigError(f"{path.name} holds no requests")
    return asks


Row = tuple[float, int, int, tuple[int, ...]]


def _shared(hashes: tuple[int, ...], input_len: int) -> str:
    blocks = [_words(TRACE_BLOCK_LEN, np.random.default_rng(block)) for block in hashes]
    return " ".join(" ".join(blocks).split(" ")[: max(1, input_len)])


def _mooncake(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        row = _object(line, number, path)
        try:
            yield (
                float(row["timestamp"]) / 1e3,
                int(row["input_length"]),
                int(row["output_length"]),
                tuple(int(block) for block in row.get("hash_ids", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path.name}, line {number}: needs timestamp, input_length and output_length"
            ) from error


def _azure(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                # Seven fractional digits stand in the files; Python's parser takes six.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                yield at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]), ()
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{path.name}, line {number}: needs TIMESTAMP, ContextTokens and GeneratedTokens"
                ) from error


def _open(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"cannot read {path}; check --dataset-path") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _object(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path.name}, line {number}: is not JSON") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{path.name}, line {number}: must be an object")
    return row
