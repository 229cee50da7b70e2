"""What a loaded model takes beside its weights, by the shapes alone: upper bounds that no run may pass.

Bounds are sums over what one layer holds at once. What must not live here: how weights are kept, which a
platform knows, and how much there is.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from xllm.arch import ArchConfig
from xllm.config.schema import EngineConfig
from xllm.engine.fitting import Demand, Part
from xllm.engine.fitting.plan import MIB
from xllm.engine.model.layout import kv_layout
from xllm.engine.model.registry import find_model
from xllm.engine.model.weights import weight_bytes
from xllm.engine.runner.batch import MAX_LOGIT_ROWS
from xllm.engine.runner.kv_size import DTYPE_BYTES, page_bytes_of
from xllm.engine.surviving.headers import PAGE_HEADER
from xllm.types import PAGE_SIZE, KVLayout

_FLOAT = 4
_PYTHON_BYTES = 56 * MIB
"""Interpreter, numpy and our own code; seen 43 MiB before a model."""
_TOKEN_BYTES = 1024
"""Of the tokenizer, per word of the vocabulary: text, ids, merges; seen 500."""
_PAGE_ACCOUNT_BYTES = 3 << 10
"""What Python keeps of a page with a known prefix: its 64 tokens, names and places in tables."""
_GROUP_SLACK_BYTES = 4 * MIB
"""Headers and pages of a KV group begin at multiples of 2 MiB."""
_PEAK_PER_WEIGHT = 12
"""Bytes: a tensor as stored, as float32 and joined with its neighbours."""
_TRANSFER_BYTES = 24 * MIB
"""Frames on their way from and to peers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Floats of a row that are alive at once: in a layer, and in the head."""

    layer: int
    head: int

    @classmethod
    def of(cls, arch: ArchConfig) -> Widths:
        q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        hidden, inner = arch.hidden_size, arch.intermediate_size
        ropes = arch.head_dim * (1 if arch.local_rope_theta is None else 2)
        # Residual and normed rows, then qkv, q and k normed and rotated, what attention gave; or the MLP.
        attention = 3 * hidden + (q + 2 * kv) + 2 * (q + kv) + q
        vocab = -(-arch.vocab_size // 16) * 16
        capped = 1 if arch.final_logit_softcap is None else 2
        return cls(layer=ropes + max(attention, 3 * hidden + 3 * inner), head=hidden + capped * vocab)


def step_parts(
    arch: ArchConfig, config: EngineConfig, max_model_len: int, buckets: tuple[int, ...], num_threads: int
) -> tuple[Part, ...]:
    """Activations, hidden rows that wait for the head, sampling. `buckets`: rows of recorded programs."""
    widths = Widths.of(arch)
    scheduler = config.scheduler
    rows = scheduler.max_num_batched_tokens
    if not scheduler.enable_chunked_prefill:
        rows = max(rows, max_model_len)
    recorded = config.platform.programs != "off" and bool(buckets) and rows <= buckets[-1]
    padded = buckets[bisect_left(buckets, rows)] if recorded else rows
    logit_rows = min(MAX_LOGIT_ROWS, padded)
    arena = _FLOAT * max(padded * widths.layer, logit_rows * widths.head)
    why = f"activations of {padded} rows in one layer, or logits of {logit_rows}"
    if not recorded:
        # Op by op every size has a free list of its own, rounded up to powers of two.
        arena, why = 2 * arena + _FLOAT * 2 * logit_rows * widths.head, f"{why}, op by op"
    carry = _FLOAT * padded * arch.hidden_size
    shaped = min(scheduler.max_num_seqs, MAX_LOGIT_ROWS)
    sampling = arch.vocab_size * (_FLOAT * shaped + 40 * num_threads + 64)
    rounded = num_threads * MIB + 4 * padded * max(arch.intermediate_size, arch.hidden_size)
    return (
        Part("arena", arena, why),
        Part("hidden rows", carry, f"{padded} rows of {arch.hidden_size} that wait for the head"),
        Part("sampling", sampling, f"{shaped} rows of {arch.vocab_size} logits that are changed, work space"),
        Part("kernels", rounded, f"rounded rows, and work space of {num_threads} threads"),
    )


def rope_part(arch: ArchConfig, max_model_len: int) -> Part:
    tables = 1 if arch.local_rope_theta is None else 2
    return Part(
        "rotary tables", _FLOAT * tables * max_model_len * arch.head_dim, f"{max_model_len} positions"
    )


def process_parts(arch: ArchConfig, config: EngineConfig) -> tuple[Part, ...]:
    text = _TOKEN_BYTES * arch.vocab_size
    own = Part("process", _PYTHON_BYTES + text, f"Python, libraries, {arch.vocab_size} words of text assets")
    if config.transfer.transfer == "off":
        return (own,)
    return (
        own,
        Part("transfers", _TRANSFER_BYTES, f"frames from and to peers, transfer={config.transfer.transfer}"),
    )


def torch_demand(
    arch: ArchConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: str,
    num_threads: int,
    process: tuple[Part, ...],
    kept_as: str | None = None,
) -> Demand:
    """Of a platform that keeps weights as values of one dtype and calls op by op; `process` is its own.

    `kept_as` is the dtype of the weights where it is not that of the computation.
    """
    kept = kept_as or dtype
    params = find_model(arch.name).parameters(arch)
    weights = Part("weights", weight_bytes(params, DTYPE_BYTES[kept]), f"as {kept}, in memory of each engine")
    largest = max(sum(math.prod(shape) for shape in param.shapes) for param in params)
    loading = Part("reading", _PEAK_PER_WEIGHT * largest, "the largest weight as stored and as values")
    return demand_of(
        arch,
        config,
        max_model_len,
        kv_layout(arch, dtype),
        shared=(),
        own=(*process, weights),
        working=step_parts(arch, config, max_model_len, (), num_threads),
        loading=(loading,),
        loads_in_turn=False,
    )


def demand_of(
    arch: ArchConfig,
    config: EngineConfig,
    max_model_len: int,
    layout: KVLayout,
    *,
    shared: tuple[Part, ...],
    own: tuple[Part, ...],
    working: tuple[Part, ...],
    loading: tuple[Part, ...],
    loads_in_turn: bool,
) -> Demand:
    """`own` beside the rotary tables, `working` beside the slack of the KV groups."""
    needed = -(-max_model_len // PAGE_SIZE)
    header = PAGE_HEADER.itemsize + _PAGE_ACCOUNT_BYTES
    slack = Part(
        "page tables",
        _GROUP_SLACK_BYTES * len(layout.groups),
        f"{len(layout.groups)} KV groups begin aligned",
    )
    return Demand(
        shared=shared,
        own=(*own, rope_part(arch, max_model_len)),
        working=(*working, slack),
        loading=loading,
        loads_in_turn=loads_in_turn,
        page_bytes=sum(page_bytes_of(group, layout.dtype) + header for group in layout.groups),
        num_needed_pages=needed,
        num_useful_pages=needed * config.scheduler.max_num_seqs,
    )
