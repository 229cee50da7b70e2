"""`xllm bench throughput|latency`: the engine without HTTP, through the same `xllm.LLM` as users have."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from xllm.cli.bench.datasets import random_prompts
from xllm.cli.settings import add_settings, load_settings
from xllm.clock import SystemClock
from xllm.config import EngineConfig
from xllm.errors import ConfigError
from xllm.llm import LLM
from xllm.types import SamplingParams


def configure_throughput(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--num-prompts", type=int, default=64, help="requests [64]")
    parser.set_defaults(measurement=run_throughput)


def configure_latency(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--batch-size", type=int, default=1, help="requests at once [1]")
    parser.add_argument(
        "--num-iters", type=int, default=5, help="measured repetitions, after one warm-up [5]"
    )
    parser.set_defaults(measurement=run_latency)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input-len", type=int, default=128, help="words a prompt [128]")
    parser.add_argument("--output-len", type=int, default=64, help="tokens an answer [64]")
    parser.add_argument("--json", type=Path, help="also write the result here")
    add_settings(parser, EngineConfig)


def _start(args: argparse.Namespace) -> Any:
    """The engine behind the public class."""
    loaded = load_settings(args, EngineConfig)
    values = dict(loaded.values)
    model = values.pop("model", "")
    if not model:
        raise ConfigError("name a model, e.g. xllm bench throughput smollm2")
    return LLM(model, **values)


def _timed(llm: Any, prompts: list[str], output_len: int) -> tuple[float, int, int]:
    """(seconds, prompt tokens, output tokens) of one call."""
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    clock = SystemClock()
    started = clock.monotonic_s()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = clock.monotonic_s() - started
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    return seconds, num_input, sum(len(output.outputs[0].token_ids) for output in outputs)


def _prompts(args: argparse.Namespace, num: int, seed: int) -> list[str]:
    asks = random_prompts(num, args.input_len, args.output_len, np.random.default_rng(seed))
    return [ask.prompt for ask in asks]


def run_throughput(args: argparse.Namespace) -> int:
    with _start(args) as llm:
        _timed(llm, _prompts(args, 1, seed=1), args.output_len)
        seconds, num_input, num_output = _timed(
            llm, _prompts(args, args.num_prompts, seed=0), args.output_len
        )
    result = {
        "elapsed_time": seconds,
        "num_requests": args.num_prompts,
        "total_num_tokens": num_input + num_output,
        "requests_per_second": args.num_prompts / seconds,
        "tokens_per_second": (num_input + num_output) / seconds,
        "output_tokens_per_second": num_output / seconds,
    }
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    return _write(args.json, result)


def run_latency(args: argparse.Namespace) -> int:
    if args.batch_size < 1 or args.num_iters < 1:
        raise ConfigError("--batch-size and --num-iters must be at least 1")
    with _start(args) as llm:
        # Another seed each time: the same prompts would come out of the prefix cache.
        runs = [
            _timed(llm, _prompts(args, args.batch_size, seed=seed), args.output_len)[0]
            for seed in range(args.num_iters + 1)
        ]
    measured = runs[1:]
    result = {
        "avg_latency": float(np.mean(measured)),
        "latencies": measured,
        "percentiles": {str(p): float(np.percentile(measured, p)) for p in (10, 25, 50, 75, 90, 99)},
    }
    print(
        f"Latency of a batch of {args.batch_size}: mean {result['avg_latency']:.3f} s, "
        f"median {float(np.median(measured)):.3f} s over {len(measured)} runs"
    )
    return _write(args.json, result)


def _write(path: Path | None, result: dict[str, Any]) -> int:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0
