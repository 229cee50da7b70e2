"""Every operation of a model, once: shapes, dtypes, formula. A model file calls these and nothing else.

Handles are opaque: a backend may hold torch tensors in them, or names of buffers in a recorded program.
Shape letters: T rows of the step, R rows that yield logits, D hidden, H query heads, K key/value heads,
E head size, X inner size of the MLP, V vocabulary, L layers of a KV group, P pages.
What must not live here: a backend, a model, a policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NewType, Protocol

import numpy as np
import numpy.typing as npt

from xllm.codes import GroupCodes
from xllm.types import KVGroup

Buffer = NewType("Buffer", object)
"""A value that only the backend that made it can read."""

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Weights = dict[str, Buffer]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeTable:
    """Cosines and sines of the rotary angles, (positions, E/2) each, as handles."""

    cos: Buffer
    sin: Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """KV of all groups. `place[layer]` = (group, index of the layer within it)."""

    groups: tuple[Buffer, ...]
    place: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpan:
    """Consecutive rows of one sequence in the step, as attention sees them.

    Rows `row` … `row + num_rows − 1` of the step hold positions `start` …; `pages[i]` holds positions
    [64·i, 64·i + 64) of the sequence in this group, −1 = given back.
    """

    row: int
    num_rows: int
    start: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step as the model sees it. T counts padding rows too; nobody reads what they compute."""

    token_ids: Buffer  # (T,) int
    positions: Buffer  # (T,) int
    logit_rows: Buffer  # (R,) int: indices into T
    attention: tuple[Buffer, ...]  # one `attention_plan` per KV group


class Ops(Protocol):
    """What a model may call. Activations between ops: the residual stream is float32, what enters a
    linear or attention is of the compute dtype. No op lets one row's value depend on another row."""

    def embedding(self, ids: Buffer, table: Buffer, scale: float | None = None) -> Buffer:
        """(T,), (V, D) → (T, D) float32: table[ids] · scale, the scale and the product rounded to the
        compute dtype (as Gemma was trained)."""

    def linear(self, x: Buffer, weight: Buffer, bias: Buffer | None = None) -> Buffer:
        """(T, in), (out, in), (out,) → (T, out): x · weightᵀ + bias. Accumulates in float32."""

    def rms_norm(self, x: Buffer, weight: Buffer, eps: float, weight_offset: float = 0.0) -> Buffer:
        """(…, W), (W,) → (…, W) of the compute dtype: x / √(mean(x²) + eps) · (weight_offset + weight).
        Computed in float32. W is the weight's width: x is taken as rows of that width."""

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        """x + y, float32, equal shapes."""

    def silu_mul(self, gate_up: Buffer) -> Buffer:
        """(T, 2X) → (T, X): g / (1 + e^−g) · u for gate_up = [g | u]. Computed in float32."""

    def gelu_tanh_mul(self, gate_up: Buffer) -> Buffer:
        """(T, 2X) → (T, X): ½ g (1 + tanh(√(2/π)(g + 0.044715 g³))) · u. Computed in float32."""

    def split_columns(self, x: Buffer, widths: Sequence[int]) -> tuple[Buffer, ...]:
        """(T, Σ widths) → one (T, width) view for each width."""

    def rope_rows(self, table: RopeTable, positions: Buffer) -> RopeTable:
        """The table's rows at `positions` (T,): once per step, for all layers."""

    def rope(self, x: Buffer, rows: RopeTable) -> Buffer:
        """(T, n·E) → same shape: each head [a | b] becomes [a·cos − b·sin | b·cos + a·sin], in float32."""

    def attention(
        self,
        q: Buffer,
        k: Buffer,
        v: Buffer,
        pages: Buffer,
        layer: int,
        plan: Buffer,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Buffer:
        """(T, H·E), (T, K·E), (T, K·E) → (T, H·E): causal grouped-query attention over pages.

        First writes this step's K and V, rounded to the KV dtype, into layer `layer` of `pages`
        (P, 2, L, K, 64, E); then every row reads all it attends to from the pages, also what this step
        wrote. Row at position p sees positions (p − window, p]. Head h reads KV head h // (H / K).
        s = scale · q·k; softcap: s = c · tanh(s / c); out = Σ eˢ⁻ᵐ v / Σ eˢ⁻ᵐ, m the row's exact maximum.
        The sums run block by block over the 64 positions of a page, in order, in float32; a block that
        is masked for a row adds exactly zero, so neighbours and chunk borders do not matter.
        """

    def select_rows(self, x: Buffer, rows: Buffer) -> Buffer:
        """(T, D), (R,) → (R, D)."""

    def softcap(self, x: Buffer, cap: float) -> Buffer:
        """cap · tanh(x / cap)."""

    def end_layer(self, layer: int) -> None:
        """Layer `layer` (from 0) is complete: a step may be stopped here and its progress is told. A model
        that never calls it runs, but in one piece."""

    def all_reduce(self, x: Buffer) -> Buffer:
        """Sum over the ranks of the tensor-parallel group; x itself at size 1."""

    def all_gather(self, x: Buffer) -> Buffer:
        """Columns of all ranks side by side; x itself at size 1."""

    def all_to_all(self, x: Buffer) -> Buffer:
        """Rows exchanged between expert ranks; x itself at size 1."""


class Backend(Ops, Protocol):
    """What the runner needs beside the ops: buffers in and out, pages, one plan per step."""

    @property
    def row_multiple(self) -> int:
        """T and R are padded to multiples of this; part of what makes rows independent."""

    @property
    def deterministic(self) -> bool:
        """Whether rows were *measured* not to depend on their company (after `probe`)."""

    def probe(self, weights: Sequence[Buffer]) -> None:
        """Measure with these (out, in) matrices which row multiple is exact; sets the two above."""

    def running(self) -> AbstractContextManager[Any]:
        """Held around a step."""

    def matrix(self, values: F32) -> Buffer:
        """(out, in) of a linear in the compute dtype, laid out as the backend likes."""

    def table(self, values: F32) -> Buffer:
        """(V, D) of an embedding in the compute dtype."""

    def tied_matrix(self, table: Buffer) -> Buffer:
        """The table as the matrix of a linear; the table itself if one layout serves both."""

    @property
    def keeps_codes(self) -> bool:
        """Whether matrices and tables that are stored as codes come as `matrix_of_codes`."""

    def matrix_of_codes(self, codes: GroupCodes) -> Buffer:
        """A matrix or table kept as codes. Only called if `keeps_codes`."""

    def vector(self, values: F32) -> Buffer:
        """A norm weight, bias or rope table: stays float32."""

    def indices(self, values: I64) -> Buffer:
        """Token ids, positions or row numbers."""

    def kv_pages(self, group: KVGroup, num_pages: int) -> Buffer:
        """Zeroed pages (P, 2, L, K, 64, E); zeroed so that a masked slot never holds a NaN."""

    def page_memory(self, pages: Buffer) -> npt.NDArray[np.uint8] | None:
        """The pages themselves as (page, byte), for transfers; None where the host cannot touch them."""

    def copy_page(self, pages: Buffer, src: int, dst: int) -> None:
        """Copy all layers of one page."""

    def zero_pages(self, pages: Buffer, which: Sequence[int]) -> None:
        """Clear pages before their first row is written: what a former owner left must not leak."""

    def attention_plan(
        self, group: KVGroup, num_heads: int, spans: Sequence[KVSpan], num_rows: int
    ) -> Buffer:
        """What `attention` needs to know about the step in this group; `num_rows` = T with padding."""

    def to_numpy(self, x: Buffer) -> F32:
        """A float32 copy or view on the host."""
