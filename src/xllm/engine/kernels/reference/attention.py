"""Attention over pages in torch, bitwise independent of batch, chunk borders and neighbours.

Per block of 64 positions: scores, exact row maximum, exponentials, block sums, block products; then the
blocks of a row are added one after the other in order. `index_add_` along dimension 0 does exactly that
on the CPU (on CUDA it uses atomics, so no exactness is claimed there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from xllm.engine.kernels.ops import I64, KVSpan
from xllm.engine.kernels.reference.tiles import TilePart, cut, parts
from xllm.types import PAGE_SIZE, KVGroup

_MAX_SCORES = 4 * 1024 * 1024
"""Scores held at once, in elements: 16 MiB stays near the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """M = height · H/K folded rows per KV head, padded to the row multiple."""

    rows: torch.Tensor  # (I, height)
    pages: torch.Tensor  # (N,)
    tile_of_block: torch.Tensor  # (N,)
    blocks_of_tile: torch.Tensor | None  # (I, most); None: all tiles have equally many blocks
    mask: torch.Tensor  # (N, 1, M, 64) 0 or −inf
    num_folded: int  # M with padding


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    num_written: int
    write_pages: torch.Tensor  # (rows,)
    write_slots: torch.Tensor  # (rows,)
    parts: tuple[_Part, ...]
    order: torch.Tensor  # (T,) where row t stands among the parts' outputs


def make_plan(
    group: KVGroup,
    num_heads: int,
    spans: Sequence[KVSpan],
    num_rows: int,
    row_multiple: int,
    device: torch.device,
) -> AttentionPlan:
    """`spans` cover rows 0 … n−1 of the step without gaps; rows n … num_rows−1 are padding."""
    per_head = num_heads // group.num_kv_heads
    order = np.zeros(num_rows, dtype=np.int64)
    made: list[_Part] = []
    placed = 0
    max_cells = _MAX_SCORES // (num_heads * PAGE_SIZE)
    for tiles, part in parts(list(cut(spans, group.window)), max_cells):
        for i, tile in enumerate(tiles):
            first = placed + i * tile.height
            order[tile.row : tile.row + tile.num_rows] = np.arange(first, first + tile.num_rows)
        placed += part.rows.size
        made.append(_to_device(part, group.window, per_head, row_multiple, device))
    positions = np.concatenate([np.arange(s.start, s.start + s.num_rows) for s in spans])
    pages = np.concatenate([_page_of_rows(s) for s in spans])
    return AttentionPlan(
        num_written=len(positions),
        write_pages=_tensor(pages, device),
        write_slots=_tensor(positions % PAGE_SIZE, device),
        parts=tuple(made),
        order=_tensor(order, device),
    )


def _page_of_rows(span: KVSpan) -> I64:
    first, last = span.start // PAGE_SIZE, (span.start + span.num_rows - 1) // PAGE_SIZE
    held = np.array(span.pages[first : last + 1], dtype=np.int64)
    return held[np.arange(span.start, span.start + span.num_rows) // PAGE_SIZE - first]


def _to_device(
    part: TilePart, window: int | None, per_head: int, row_multiple: int, device: torch.device
) -> _Part:
    folded = np.repeat(part.positions, per_head, axis=1)
    num_folded = -(-folded.shape[1] // row_multiple) * row_multiple
    # Padding rows copy the last row's position, so that they too see something and stay finite.
    folded = np.pad(folded, ((0, 0), (0, num_folded - folded.shape[1])), mode="edge")
    keys = part.block_starts[:, None] + np.arange(PAGE_SIZE)[None, :]
    queries = folded[part.tile_of_block][:, :, None]
    seen = keys[:, None, :] <= queries
    if window is not None:
        seen &= keys[:, None, :] > queries - window
    mask = np.where(seen, np.float32(0.0), np.float32(-np.inf))[:, None]
    num_tiles = len(part.rows)
    even = num_tiles * part.blocks_of_tile.shape[1] == len(part.pages)
    return _Part(
        rows=_tensor(part.rows, device),
        pages=_tensor(part.pages, device),
        tile_of_block=_tensor(part.tile_of_block, device),
        blocks_of_tile=None if even else _tensor(part.blocks_of_tile, device),
        mask=torch.from_numpy(mask).to(device),
        num_folded=num_folded,
    )


def _tensor(values: I64, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """q (T, H·E), k and v (T, K·E), pages (P, 2, L, K, 64, E) → (T, H·E) float32."""
    num_kv_heads, head_dim = pages.shape[3], pages.shape[5]
    keys, values = pages[:, 0, layer], pages[:, 1, layer]
    n = plan.num_written
    where = (plan.write_pages, plan.write_slots)
    keys.transpose(1, 2).index_put_(where, k[:n].reshape(n, num_kv_heads, head_dim).to(pages.dtype))
    values.transpose(1, 2).index_put_(where, v[:n].reshape(n, num_kv_heads, head_dim).to(pages.dtype))
    scaled = q.float() * scale
    outs = [_attend_part(scaled, keys, values, part, softcap) for part in plan.parts]
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).index_select(0, plan.order)


def _attend_part(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: _Part, softcap: float | None
) -> torch.Tensor:
    """(T, H·E) → (I · height, H·E), rows in the part's order."""
    num_tiles, height = part.rows.shape
    num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
    per_head = q.shape[1] // (num_kv_heads * head_dim)
    num_blocks, folded = len(part.pages), part.num_folded
    x = q.index_select(0, part.rows.view(-1)).view(num_tiles, height, num_kv_heads, per_head, head_dim)
    x = x.transpose(1, 2).contiguous().view(num_tiles, num_kv_heads, height * per_head, head_dim)
    if folded > height * per_head:
        x = torch.nn.functional.pad(x, (0, 0, 0, folded - height * per_head))
    if num_blocks > num_tiles:
        x = x.index_select(0, part.tile_of_block)
    flat = (num_blocks * num_kv_heads, -1, head_dim)
    block_keys = keys.index_select(0, part.pages).float().view(flat)
    scores = torch.bmm(x.view(flat), block_keys.transpose(1, 2))
    scores = scores.view(num_blocks, num_kv_heads, folded, PAGE_SIZE)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.add_(part.mask)
    highest = _row_max(scores.amax(-1), part, num_tiles)
    weights = scores.sub_(highest.unsqueeze(-1)).exp_()
    sums = weights.sum(-1)
    block_values = values.index_select(0, part.pages).float().view(flat)
    out = torch.bmm(weights.view(num_blocks * num_kv_heads, folded, PAGE_SIZE), block_values)
    out = out.view(num_blocks, num_kv_heads, folded, head_dim)
    if num_blocks > num_tiles:
        # In order, one block after the other: the rule that makes path and company irrelevant.
        out = out.new_zeros(num_tiles, *out.shape[1:]).index_add_(0, part.tile_of_block, out)
        sums = sums.new_zeros(num_tiles, *sums.shape[1:]).index_add_(0, part.tile_of_block, sums)
    out = (out / sums.unsqueeze(-1))[:, :, : height * per_head]
    out = out.reshape(num_tiles, num_kv_heads, height, per_head * head_dim).transpose(1, 2)
    return out.reshape(num_tiles * height, -1)


def _row_max(highest: torch.Tensor, part: _Part, num_tiles: int) -> torch.Tensor:
    """(N, K, M) block maxima → the row's maximum over its tile's blocks, for each block again."""
    if len(highest) == num_tiles:
        return highest
    if part.blocks_of_tile is None:
        grouped = highest.view(num_tiles, -1, *highest.shape[1:])
    else:
        grouped = highest[part.blocks_of_tile]
    return grouped.amax(1).index_select(0, part.tile_of_block)
