"""Perplexity of every encoding in xLLM, paired token by token with the float32 that all were made from.

    python -m benchmarks.compare.perplexity --model smollm2

Speed may only be compared at equal quality; this says what each class costs. Windows are scored on
their own, without their first token; the differences between encodings are per window.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import machine, texts
from benchmarks.compare.adapters.xllm import keywords
from benchmarks.compare.weights import encode, location
from xllm import LLM, SamplingParams
from xllm.artifacts import resolve

REFERENCE = "float32"
ENCODINGS = (REFERENCE, "bf16", "q8_0", "q4_1", "q4_0")
WINDOWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """`change` is the perplexity over float32's, minus 1; `error` its standard error over windows."""

    text: str
    weights: str
    num_tokens: int
    perplexity: float
    change: float
    error: float


def window_losses(llm: Any, windows: Sequence[Sequence[int]]) -> list[float]:
    """Mean negative log-likelihood in nats per scored token of each window."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    losses = []
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        part = windows[start : start + WINDOWS_AT_ONCE]
        outputs = llm.generate([{"prompt_token_ids": list(w)} for w in part], params, use_tqdm=False)
        losses += [-sum(_scored(o)) / (len(o.prompt_token_ids) - 1) for o in outputs]
    return losses


def _scored(output: Any) -> Iterator[float]:
    for token, found in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        entry = found[token]
        yield entry.logprob if hasattr(entry, "logprob") else float(entry)


def compare(
    text: str, weights: str, losses: Sequence[float], reference: Sequence[float], window: int
) -> Score:
    """All windows are equally long, so the mean over windows is the mean over tokens."""
    difference = np.asarray(losses) - np.asarray(reference)
    change = math.exp(float(difference.mean())) - 1.0
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else math.nan
    return Score(
        text=text,
        weights=weights,
        num_tokens=len(losses) * (window - 1),
        perplexity=math.exp(float(np.mean(losses))),
        change=change,
        error=error * (1.0 + change),
    )


def options_of(model: str, folder: Path, weights: str) -> dict[str, str]:
    """What to load and how to compute: as the comparison of speed does. float32 is the file dequantised."""
    if weights == REFERENCE:
        return {"model": model, "dtype": "float32"}
    if weights == "bf16":
        return {"model": str(location(folder, weights, gguf=False)), "quantize": "none"}
    # Unasked, a small model's codes become bfloat16, which would hide what coded activations cost.
    return {"model": str(location(folder, weights, gguf=True)), "quantize": "file"}


def known(out: Path, model: str) -> dict[str, str]:
    """What the last run found, by encoding, in words for the table of engines."""
    path = result_path(out, model)
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    told: dict[str, list[str]] = {}
    for row in found["scores"]:
        if row["weights"] != REFERENCE:
            told.setdefault(row["weights"], []).append(
                f"{row['text']} {row['perplexity']:.3f} ({row['change']:+.2%})"
            )
    return {name: ", ".join(words) for name, words in told.items()}


def result_path(out: Path, model: str) -> Path:
    return out / f"perplexity-{Path(model).name}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights-dir", type=Path, default=Path(".peers/weights"))
    parser.add_argument("--tokens", type=int, default=16_384, help="of each text [16384]")
    parser.add_argument("--window", type=int, default=512, help="tokens scored together [512]")
    parser.add_argument("--weights", nargs="+", choices=ENCODINGS[1:], default=ENCODINGS[1:])
    parser.add_argument("--xllm-flags", type=shlex.split, default=[], help="of all but the float32 reference")
    parser.add_argument(
        "--reference-cache", type=Path, help="folder that keeps float32's losses, by model, texts and window"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    folder = encode(args.model, args.weights_dir)
    digests = {name: texts.digest(text) for name, text in texts.both().items()}
    losses: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, float] = {}
    for weights in (REFERENCE, *args.weights):
        began = time.monotonic()
        losses[weights] = (
            reference(args, folder, digests) if weights == REFERENCE else measure(args, folder, weights)
        )
        seconds[weights] = time.monotonic() - began
        print(f"{weights}: {seconds[weights]:.0f} s, with loading", file=sys.stderr, flush=True)
    scores = [
        compare(text, weights, losses[weights][text], losses[REFERENCE][text], args.window)
        for text in digests
        for weights in losses
    ]
    print(f"{'text':<7} {'weights':<8} {'tokens':>7} {'perplexity':>11} {'over float32':>13} {'± s.e.':>8}")
    for row in scores:
        print(
            f"{row.text:<7} {row.weights:<8} {row.num_tokens:>7} {row.perplexity:>11.4f} "
            f"{row.change:>+13.3%} {row.error:>8.3%}"
        )
    raw = {
        "command": shlex.join(["python", "-m", "benchmarks.compare.perplexity", *sys.argv[1:]]),
        "machine": machine.describe(),
        "source": resolve(args.model).weights_digest(),
        "texts": digests,
        "window": args.window,
        "seconds": seconds,
        "scores": [asdict(row) for row in scores],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    places = {".peers": args.weights_dir.parent, "RESULTS": args.out}
    if args.reference_cache:
        places["CACHE"] = args.reference_cache
    text = machine.without_places(json.dumps(raw, indent=1), places)
    result_path(args.out, args.model).write_text(text + "\n", encoding="utf-8")
    return 0


def reference(args: argparse.Namespace, folder: Path, digests: dict[str, str]) -> dict[str, list[float]]:
    """float32's losses: torch's, minutes of work that no change of ours can alter, so they may be kept.

    The name is a digest of all that they depend on; another torch is another name.
    """
    if args.reference_cache is None:
        return measure(args, folder, REFERENCE)
    parts = {
        "source": resolve(args.model).weights_digest(),
        "texts": digests,
        "tokens": args.tokens,
        "window": args.window,
        "torch": version("torch"),
    }
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    path = args.reference_cache / f"float32-{name}.json"
    if path.exists():
        found: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8"))["losses"]
        return found
    losses = measure(args, folder, REFERENCE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(parts | {"losses": losses}) + "\n", encoding="utf-8")
    return losses


def measure(args: argparse.Namespace, folder: Path, weights: str) -> dict[str, list[float]]:
    """Losses of the windows of each text."""
    chosen = options_of(args.model, folder, weights)
    extra = {} if weights == REFERENCE else keywords(tuple(args.xllm_flags))
    # A cached prefix has no logits to score, so none is kept.
    options = chosen | {"max_model_len": args.window + 8, "enable_prefix_caching": False} | extra
    with LLM(**options) as llm:
        tokenizer = llm.get_tokenizer()
        return {
            name: window_losses(llm, windows(tokenizer.encode(text), args.tokens, args.window))
            for name, text in texts.both().items()
        }


def windows(ids: Sequence[int], num_tokens: int, window: int) -> list[list[int]]:
    """Whole windows, `num_tokens` scored tokens at least if the text is that long."""
    wanted = min(-(-num_tokens // (window - 1)), len(ids) // window)
    return [list(ids[index * window : (index + 1) * window]) for index in range(wanted)]


if __name__ == "__main__":
    sys.exit(main())
