"""Records what a model calls: `Recorder` implements `Ops` on symbolic values and computes nothing.

The result is a list of nodes in single-assignment form, free of row counts, addresses and layouts. What is
done with it stands in `fusion`, `layout` and `program`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from xllm.engine.kernels.native.handles import Matrix, Values
from xllm.engine.kernels.ops import Batch, Buffer, Ops, RopeTable
from xllm.errors import InternalError

FLOAT_BYTES = 4


class Op(IntEnum):
    """`XN_OP_…` of the C header."""

    EMBEDDING = 1
    SELECT_ROWS = 2
    LINEAR = 3
    RMS_NORM = 4
    ADD = 5
    SILU_MUL = 6
    GELU_TANH_MUL = 7
    SOFTCAP = 8
    ROPE = 9
    ATTENTION = 10
    END_LAYER = 11
    RMS_NORM_ROUNDED = 12
    LINEAR_FUSED = 13


class Epilogue(IntEnum):
    """`XN_STORE` and its kin of the C header."""

    STORE = 0
    ADD_RESIDUAL = 1
    SILU_MUL = 2
    GELU_TANH_MUL = 3


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """Rows of floats, or of `row_bytes` raw bytes. A view has an owner and begins at column `first` of it."""

    width: int
    of_logits: bool
    """Whether there is a row for each row that yields logits, not for each row of the step."""
    row_bytes: int
    owner: Value | None = None
    first: int = 0

    @property
    def root(self) -> Value:
        return self if self.owner is None else self.owner

    @property
    def ld(self) -> int:
        return self.root.width

    def columns(self, first: int, width: int) -> Value:
        return Value(width, self.of_logits, self.row_bytes, self.root, self.first + first)


@dataclass(frozen=True, slots=True)
class Ids:
    """A list of row numbers that every step brings: `XN_IDS_…`."""

    slot: int


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The attention plan of a KV group, which every step brings."""

    group: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Node:
    """Fields as in `xn_node`; `weight` and `vector` are held, so that their memory outlives the program."""

    op: Op
    inputs: tuple[Value, ...] = ()
    output: Value | None = None
    weight: Matrix | None = None
    vector: Values | None = None
    count: int = 0
    width: int = 0
    index: int = 0
    layer: int = 0
    limit: int = 0
    a: float = 0.0
    b: float = 0.0
    epilogue: Epilogue = Epilogue.STORE
    table: Values | None = None
    """What SELECT_ROWS takes rows of, if not of its input."""


@dataclass(frozen=True, slots=True)
class Recording:
    """`source` is the value that the caller brings (of a head), `result` the one it takes."""

    nodes: tuple[Node, ...]
    result: Value
    source: Value | None = None


@dataclass(slots=True)
class Recorder:
    """One recording at a time; see `Ops` for what each operation means."""

    pages: Sequence[Buffer]
    """By KV group."""
    nodes: list[Node] = field(default_factory=list)

    def embedding(self, ids: Buffer, table: Buffer, scale: float | None = None) -> Buffer:
        m = _matrix(table)
        out = _value(m.num_in, of_logits=False)
        return self._add(Node(op=Op.EMBEDDING, output=out, weight=m, index=_ids(ids).slot, a=scale or 0.0))

    def linear(self, x: Buffer, weight: Buffer, bias: Buffer | None = None) -> Buffer:
        a, m = _v(x), _matrix(weight)
        if a.width != m.num_in:
            raise InternalError("a linear's input has another width than its weight")
        vector = None if bias is None else _vector(bias)
        out = _value(m.num_out, a.of_logits)
        return self._add(Node(op=Op.LINEAR, inputs=(a,), output=out, weight=m, vector=vector))

    def rms_norm(self, x: Buffer, weight: Buffer, eps: float, weight_offset: float = 0.0) -> Buffer:
        a, w = _v(x), _vector(weight)
        runs, rest = divmod(a.width, w.width)
        if rest:
            raise InternalError("a norm's weight does not divide the width of its input")
        out = _value(a.width, a.of_logits)
        node = Node(
            op=Op.RMS_NORM,
            inputs=(a,),
            output=out,
            vector=w,
            count=runs,
            width=w.width,
            a=eps,
            b=weight_offset,
        )
        return self._add(node)

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        a, b = _v(x), _v(y)
        if (a.width, a.of_logits) != (b.width, b.of_logits):
            raise InternalError("a sum of unequal shapes")
        out = _value(a.width, a.of_logits)
        return self._add(Node(op=Op.ADD, inputs=(a, b), output=out, width=a.width))

    def silu_mul(self, gate_up: Buffer) -> Buffer:
        return self._gated(Op.SILU_MUL, _v(gate_up))

    def gelu_tanh_mul(self, gate_up: Buffer) -> Buffer:
        return self._gated(Op.GELU_TANH_MUL, _v(gate_up))

    def split_columns(self, x: Buffer, widths: Sequence[int]) -> tuple[Buffer, ...]:
        a = _v(x)
        if sum(widths) != a.width:
            raise InternalError("columns are split into another number than there are")
        firsts = [sum(widths[:i]) for i in range(len(widths))]
        return tuple(Buffer(a.columns(f, w)) for f, w in zip(firsts, widths, strict=True))

    def rope_rows(self, table: RopeTable, positions: Buffer) -> RopeTable:
        slot = _ids(positions).slot
        return RopeTable(cos=self._taken(_vector(table.cos), slot), sin=self._taken(_vector(table.sin), slot))

    def rope(self, x: Buffer, rows: RopeTable) -> Buffer:
        a, cos, sin = _v(x), _v(rows.cos), _v(rows.sin)
        heads, rest = divmod(a.width, 2 * cos.width)
        if rest or sin.ld != cos.ld:
            raise InternalError("rotary tables of another head size")
        out = _value(a.width, a.of_logits)
        return self._add(Node(op=Op.ROPE, inputs=(a, cos, sin), output=out, count=heads, width=cos.width))

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
        if not isinstance(plan, GroupPlan) or self.pages[plan.group] is not pages:
            raise TypeError("a plan of another backend or KV group")
        inputs = (_v(q), _v(k), _v(v))
        out = _value(inputs[0].width, of_logits=False)
        return self._add(
            Node(
                op=Op.ATTENTION,
                inputs=inputs,
                output=out,
                index=plan.group,
                layer=layer,
                a=scale,
                b=softcap or 0.0,
            )
        )

    def select_rows(self, x: Buffer, rows: Buffer) -> Buffer:
        a = _v(x)
        if a.of_logits:
            raise InternalError("rows are selected of rows that yield logits")
        out = _value(a.width, of_logits=True)
        node = Node(op=Op.SELECT_ROWS, inputs=(a,), output=out, index=_ids(rows).slot, width=a.width)
        return self._add(node)

    def softcap(self, x: Buffer, cap: float) -> Buffer:
        a = _v(x)
        out = _value(a.width, a.of_logits)
        return self._add(Node(op=Op.SOFTCAP, inputs=(a,), output=out, width=a.width, a=cap))

    def end_layer(self, layer: int) -> None:
        self.nodes.append(Node(op=Op.END_LAYER, layer=layer))

    def all_reduce(self, x: Buffer) -> Buffer:
        return x

    def all_gather(self, x: Buffer) -> Buffer:
        return x

    def all_to_all(self, x: Buffer) -> Buffer:
        return x

    def _add(self, node: Node) -> Buffer:
        self.nodes.append(node)
        return Buffer(node.output)

    def _taken(self, table: Values, slot: int) -> Buffer:
        out = _value(table.width, of_logits=False)
        limit = len(table.array)
        node = Node(op=Op.SELECT_ROWS, output=out, table=table, index=slot, width=table.width, limit=limit)
        return self._add(node)

    def _gated(self, op: Op, gate_up: Value) -> Buffer:
        out = _value(gate_up.width // 2, gate_up.of_logits)
        return self._add(Node(op=op, inputs=(gate_up,), output=out, width=out.width))


def record_forward(forward: Callable[[Ops, Batch], Buffer], pages: Sequence[Buffer]) -> Recording:
    """The operations of one step. Raises what the model raises if it needs more than `Ops`."""
    recorder = Recorder(pages)
    batch = Batch(
        token_ids=Buffer(Ids(0)),
        positions=Buffer(Ids(1)),
        logit_rows=Buffer(Ids(2)),
        attention=tuple(Buffer(GroupPlan(g)) for g in range(len(pages))),
    )
    return _finished(recorder, _v(forward(recorder, batch)))


def record_head(head: Callable[[Ops, Buffer], Buffer], width: int) -> Recording:
    """From hidden states, `width` wide, to logits."""
    recorder = Recorder(())
    source = _value(width, of_logits=True)
    return _finished(recorder, _v(head(recorder, Buffer(source))), source)


def _finished(recorder: Recorder, result: Value, source: Value | None = None) -> Recording:
    if not result.of_logits or all(node.output is not result for node in recorder.nodes):
        raise InternalError("the result is no value of its own with a row for each row that yields logits")
    return Recording(tuple(recorder.nodes), result, source)


def _value(width: int, of_logits: bool) -> Value:
    return Value(width, of_logits, FLOAT_BYTES * width)


def _v(x: Buffer) -> Value:
    if isinstance(x, Value):
        return x
    raise TypeError("a handle of another kind or backend")


def _ids(x: Buffer) -> Ids:
    if isinstance(x, Ids):
        return x
    raise TypeError("a handle of another kind or backend")


def _matrix(x: Buffer) -> Matrix:
    if isinstance(x, Matrix):
        return x
    raise TypeError("a handle of another kind or backend")


def _vector(x: Buffer) -> Values:
    if isinstance(x, Values):
        return x
    raise TypeError("a handle of another kind or backend")
