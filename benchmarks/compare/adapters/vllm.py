"""vLLM's CPU backend: its OpenAI server on the bfloat16 directory."""

from __future__ import annotations

import ctypes.util
from pathlib import Path

from benchmarks.compare.adapters.context import Context, fill, installed, output_of
from benchmarks.compare.engine import Launch
from benchmarks.compare.machine import usable_cores
from benchmarks.compare.settings import Entry

_TCMALLOC_PLACES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")


def launch(entry: Entry, context: Context) -> Launch:
    python = installed(context, "vllm")
    weights = context.weights(entry, gguf=False)
    port = context.port()
    words = context.words(port, weights)
    preload = _preload(python.parent.parent)
    env = dict(zip(entry.env, fill(tuple(entry.env.values()), words), strict=True))
    if context.num_threads < usable_cores():
        # "auto" takes all cores; --threads is a limit for every engine.
        env["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{context.num_threads - 1}"
    # What `vllm serve` runs. That command itself asks for the metadata of a package called vllm, which
    # the CPU build is not.
    command = (str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights))
    version = output_of([str(python), "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"])
    return Launch(
        command=(*command, *fill(entry.flags, words)),
        env=env | {"LD_PRELOAD": ":".join(preload)},
        port=port,
        about={
            "version": version,
            "flags": " ".join(fill(entry.flags, words)),
            "env": " ".join(f"{k}={v}" for k, v in env.items()),
            "preloaded": " ".join(Path(path).name for path in preload) or "nothing",
        },
    )


def _preload(environment: Path) -> list[str]:
    """tcmalloc and Intel's OpenMP, which its CPU page calls highly recommended, where they are.

    OpenMP comes with the package; tcmalloc is the system's (Debian: libtcmalloc-minimal4).
    """
    found = []
    name = ctypes.util.find_library("tcmalloc_minimal")
    if name is not None:
        found += [str(Path(p, name)) for p in _TCMALLOC_PLACES if Path(p, name).exists()][:1]
    openmp = environment / "lib" / "libiomp5.so"
    return [*found, str(openmp)] if openmp.exists() else found
