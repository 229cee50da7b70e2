"""Cuts the rows of a step into attention tiles: numbers only, once per step and KV group.

A tile is up to 64 rows of one sequence with the blocks they may see. Tiles of equal height are computed
together in one part; which tiles share a part cannot change a result, since all sums stay within a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xllm.engine.kernels.ops import I64, KVSpan
from xllm.errors import InternalError
from xllm.types import PAGE_SIZE

_HEIGHTS = (1, 4, 16, 64)
"""Rows of a tile. Heights between are padded by repeating the last row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    row: int
    num_rows: int
    height: int
    start: int
    first_block: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePart:
    """Tiles of one height as index arrays; N blocks of I tiles, each of `height` rows."""

    rows: I64  # (I, height) rows of the step
    positions: I64  # (I, height)
    pages: I64  # (N,)
    block_starts: I64  # (N,) position of the block's first slot
    tile_of_block: I64  # (N,) ascending
    blocks_of_tile: I64  # (I, most blocks) indices into N; short tiles repeat their first block


def cut(spans: Sequence[KVSpan], window: int | None) -> Iterator[Tile]:
    """Tiles of all spans, in order."""
    for span in spans:
        done = 0
        while done < span.num_rows:
            num_rows = min(_HEIGHTS[-1], span.num_rows - done)
            yield _tile(span, done, num_rows, window)
            done += num_rows


def _tile(span: KVSpan, done: int, num_rows: int, window: int | None) -> Tile:
    start = span.start + done
    first = 0 if window is None else max(0, start - window + 1) // PAGE_SIZE
    pages = span.pages[first : (start + num_rows - 1) // PAGE_SIZE + 1]
    if not pages or min(pages) < 0 or len(pages) * PAGE_SIZE < start + num_rows - first * PAGE_SIZE:
        raise InternalError("a row would read a page that its sequence does not hold")
    height = next(h for h in _HEIGHTS if h >= num_rows)
    return Tile(
        row=span.row + done, num_rows=num_rows, height=height, start=start, first_block=first, pages=pages
    )


def parts(tiles: Sequence[Tile], max_cells: int) -> Iterator[tuple[list[Tile], TilePart]]:
    """Tiles grouped by height; a part holds at most `max_cells` (row, block) pairs, or one tile."""
    for height in _HEIGHTS:
        chosen: list[Tile] = []
        cells = 0
        for tile in (t for t in tiles if t.height == height):
            cost = height * len(tile.pages)
            if chosen and cells + cost > max_cells:
                yield chosen, _arrays(chosen)
                chosen, cells = [], 0
            chosen.append(tile)
            cells += cost
        if chosen:
            yield chosen, _arrays(chosen)


def _arrays(tiles: Sequence[Tile]) -> TilePart:
    steps = np.arange(tiles[0].height)
    last = np.array([t.num_rows - 1 for t in tiles])[:, None]
    within = np.minimum(steps[None, :], last)
    counts = np.array([len(t.pages) for t in tiles])
    firsts = np.cumsum(counts) - counts
    columns = np.arange(counts.max())[None, :]
    starts = [np.arange(t.first_block, t.first_block + len(t.pages)) * PAGE_SIZE for t in tiles]
    return TilePart(
        rows=np.array([t.row for t in tiles])[:, None] + within,
        positions=np.array([t.start for t in tiles])[:, None] + within,
        pages=np.concatenate([np.array(t.pages, dtype=np.int64) for t in tiles]),
        block_starts=np.concatenate(starts),
        tile_of_block=np.repeat(np.arange(len(tiles)), counts),
        blocks_of_tile=firsts[:, None] + np.where(columns < counts[:, None], columns, 0),
    )
