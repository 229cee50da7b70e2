"""What attention needs to know about a step in one KV group, as the C struct and its arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import chain

import numpy as np

from xllm.engine.kernels.native.handles import AttentionPlan
from xllm.engine.kernels.native.library import AttentionPlanStruct
from xllm.engine.kernels.ops import KVSpan
from xllm.errors import InternalError
from xllm.types import PAGE_SIZE, KVGroup


def make_plan(
    library: ctypes.CDLL, group: KVGroup, num_heads: int, spans: Sequence[KVSpan], num_rows: int
) -> AttentionPlan:
    """Raises InternalError when a row would read a page that its sequence does not hold."""
    flat = []
    first_page = 0
    for span in spans:
        # The kernel indexes the page table by block, so it must reach the last row's.
        if len(span.pages) * PAGE_SIZE < span.start + span.num_rows:
            raise _not_held()
        flat.append((span.row, span.num_rows, span.start, first_page, -1))
        first_page += len(span.pages)
    rows = np.array(flat, dtype=np.int64).reshape(-1, 5)
    table = np.fromiter(chain.from_iterable(s.pages for s in spans), dtype=np.int64, count=first_page)
    struct = AttentionPlanStruct(
        spans=rows.ctypes.data,
        num_spans=len(flat),
        page_table=table.ctypes.data,
        num_heads=num_heads,
        num_kv_heads=group.num_kv_heads,
        head_dim=group.head_dim,
        num_layers=len(group.layers),
        window=group.window or 0,
    )
    items = np.empty((num_rows + len(flat), 3), dtype=np.int32)
    count = library.xn_attention_items(ctypes.addressof(struct), items.ctypes.data, len(items))
    if not 0 <= count <= len(items):
        raise _not_held()
    struct.num_items, struct.items = count, items.ctypes.data
    return AttentionPlan(struct, (rows, table, items))


def _not_held() -> InternalError:
    return InternalError("a row would read a page that its sequence does not hold")
