"""xLLM from this checkout: bf16 from the Hugging Face directory, 8 and 4 bits from GGUF."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.compare import workers
from benchmarks.compare.adapters.context import Context, fill
from benchmarks.compare.engine import Launch
from benchmarks.compare.settings import Entry
from xllm.version import __version__


def launch(entry: Entry, context: Context) -> Launch:
    weights = context.weights(entry, gguf=entry.weights != "bf16")
    port = context.port()
    flags = fill((*entry.flags, *context.xllm_flags), context.words(port, weights))
    about = {"version": __version__, "flags": " ".join(flags)}
    if entry.transport == "http":
        command = (sys.executable, "-m", "xllm.cli.main", "serve", str(weights), *flags)
        # Peers queue without a limit; what we refused would not be compared.
        env = {"XLLM_MAX_QUEUE_DELAY_S": "0"}
        return Launch(command=command, env=env, port=port, about=about)
    program = Path(workers.__file__).with_name("xllm_worker.py")
    settings = json.dumps({"model": str(weights)} | keywords(flags))
    return Launch(command=(sys.executable, str(program), settings), about=about)


def keywords(flags: tuple[str, ...]) -> dict[str, str | int]:
    """`--max-num-seqs 32` as `max_num_seqs=32`: the library takes the same names."""
    names = (flag.removeprefix("--").replace("-", "_") for flag in flags[::2])
    return {name: int(v) if v.isdigit() else v for name, v in zip(names, flags[1::2], strict=True)}
