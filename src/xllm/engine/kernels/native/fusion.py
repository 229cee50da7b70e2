"""Peephole over a recording: neighbours that one kernel call computes bit for bit become one node.

A rule applies only where the value between two nodes has no other reader. No layout, no addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from xllm.engine.kernels.native.handles import Matrix
from xllm.engine.kernels.native.recording import Epilogue, Node, Op, Recording, Value

_GATES = {Op.SILU_MUL: Epilogue.SILU_MUL, Op.GELU_TANH_MUL: Epilogue.GELU_TANH_MUL}
_LINEARS = (Op.LINEAR, Op.LINEAR_FUSED)

RoundedStride = Callable[[Matrix], int]
"""Bytes of an input row once it is rounded for this weight."""


def fuse(recording: Recording, rounded_stride: RoundedStride) -> Recording:
    """The same values by fewer nodes."""
    nodes = _with_epilogues(recording.nodes, recording.result)
    return replace(recording, nodes=_with_rounded_norms(nodes, recording.result, rounded_stride))


def _with_epilogues(nodes: Sequence[Node], result: Value) -> tuple[Node, ...]:
    """linear → gate and linear → sum become a linear that ends so, where the second node stood: there
    both inputs exist, whichever was computed first."""
    makers = _sole(nodes, result, (Op.LINEAR,))
    fused: list[Node] = []
    gone: set[Node] = set()
    for node in nodes:
        found = _ending(node, makers)
        if found is None:
            fused.append(node)
            continue
        maker, epilogue, others = found
        gone.add(maker)
        inputs = (*maker.inputs, *others)
        fused.append(replace(maker, op=Op.LINEAR_FUSED, inputs=inputs, output=node.output, epilogue=epilogue))
    return tuple(n for n in fused if n not in gone)


def _ending(node: Node, makers: dict[Value, Node]) -> tuple[Node, Epilogue, tuple[Value, ...]] | None:
    """(the linear that this node ends, how, what else it reads)."""
    if node.op in _GATES and node.inputs[0] in makers:
        return makers[node.inputs[0]], _GATES[node.op], ()
    if node.op is Op.ADD:
        # Either side may be the product: a sum of two floats does not depend on their order.
        for other, product in (node.inputs, node.inputs[::-1]):
            if product in makers:
                return makers[product], Epilogue.ADD_RESIDUAL, (other,)
    return None


def _with_rounded_norms(
    nodes: Sequence[Node], result: Value, rounded_stride: RoundedStride
) -> tuple[Node, ...]:
    """norm → linear: the norm rounds as the linear would, once and without a float32 row in between."""
    makers = _sole(nodes, result, (Op.RMS_NORM,))
    rounded: dict[Node, Node] = {}
    for node in nodes:
        norm = makers.get(node.inputs[0]) if node.op in _LINEARS else None
        # A norm per head is another thing, and its rows are no inputs of a weight.
        if norm is None or norm.count != 1 or node.weight is None or norm.output is None:
            continue
        stride = rounded_stride(node.weight)
        row = Value(norm.output.width, norm.output.of_logits, stride)
        rounded[norm] = replace(norm, op=Op.RMS_NORM_ROUNDED, output=row, weight=node.weight)
        inputs = (row, *node.inputs[1:])
        rounded[node] = replace(node, op=Op.LINEAR_FUSED, inputs=inputs, count=1)
    return tuple(rounded.get(n, n) for n in nodes)


def _sole(nodes: Sequence[Node], result: Value, ops: Sequence[Op]) -> dict[Value, Node]:
    """Nodes of these kinds by output, where exactly one input of one node reads it, and all of it."""
    reads = Counter(value.root for node in nodes for value in node.inputs)
    reads[result] += 2  # it is read by the caller too
    return {n.output: n for n in nodes if n.op in ops and n.output is not None and reads[n.output] == 1}
