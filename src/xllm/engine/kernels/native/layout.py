"""Where the values of a recording live: offsets into one arena, for a number of rows.

A value's memory is free for others after its last reader. Where a kernel may write over its input, it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xllm.engine.kernels.native.recording import Epilogue, Node, Op, Recording, Value

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """Byte offsets of the values that live in the arena; the others are the caller's."""

    offsets: Mapping[Value, int]
    num_bytes: int


class _Space:
    """First fit over what is in use; a step's peak matters, not how fast it is found."""

    def __init__(self) -> None:
        self._used: list[tuple[int, int]] = []
        self.peak = 0

    def take(self, size: int) -> int:
        at = 0
        for begin, end in self._used:
            if at + size <= begin:
                break
            at = end
        self._used.append((at, at + size))
        self._used.sort()
        self.peak = max(self.peak, at + size)
        return at

    def give_back(self, at: int) -> None:
        self._used = [piece for piece in self._used if piece[0] != at]


def lay_out(recording: Recording, rows: int, outside: frozenset[Value]) -> ArenaLayout:
    """For at most `rows` rows of either kind. `outside`: values that live elsewhere."""
    last = _last_reads(recording)
    space = _Space()
    offsets: dict[Value, int] = {}
    for position, node in enumerate(recording.nodes):
        dying = {v.root for v in node.inputs if last.get(v.root) == position and v.root in offsets}
        out = node.output
        if out is not None and out not in outside:
            heir = _written_over(node)
            if heir in dying and heir is not None and heir.row_bytes == out.row_bytes:
                offsets[out] = offsets[heir]
                dying.discard(heir)
            else:
                offsets[out] = space.take(-(-max(out.row_bytes * rows, 1) // _ALIGN) * _ALIGN)
            if out not in last:
                dying.add(out)
        for value in dying:
            space.give_back(offsets[value])
    return ArenaLayout(offsets, space.peak)


def _written_over(node: Node) -> Value | None:
    """The input whose very elements the node may replace: each is read before it is written."""
    if node.op in (Op.ADD, Op.RMS_NORM, Op.SOFTCAP):
        found = node.inputs[0]
    elif node.op is Op.LINEAR_FUSED and node.epilogue is Epilogue.ADD_RESIDUAL:
        found = node.inputs[1]
    else:
        return None
    same_input_twice = sum(v.root is found.root for v in node.inputs) > 1 and node.op is not Op.ADD
    return None if found.owner is not None or same_input_twice else found


def _last_reads(recording: Recording) -> dict[Value, int]:
    last = {v.root: i for i, node in enumerate(recording.nodes) for v in node.inputs}
    last[recording.result] = len(recording.nodes)
    return last
