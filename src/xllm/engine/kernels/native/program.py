"""A program: nodes with places, as the C replay reads them, for at most so many rows.

What must not live here: how nodes come about, when a program is made or run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p

from xllm.engine.kernels.native.layout import lay_out
from xllm.engine.kernels.native.recording import FLOAT_BYTES, Node, Recording, Value

IN_ARENA, IN_CARRY, AT_ADDRESS = 0, 1, 2


class PlaceStruct(ctypes.Structure):
    """`xn_place`."""

    _fields_ = (("space", c_int64), ("at", c_int64), ("ld", c_int64))


class NodeStruct(ctypes.Structure):
    """`xn_node`."""

    _fields_ = (
        ("op", c_int32),
        ("logit_rows", c_int32),
        ("x", PlaceStruct),
        ("y", PlaceStruct),
        ("z", PlaceStruct),
        ("to", PlaceStruct),
        ("weight", c_void_p),
        ("vector", c_void_p),
        ("count", c_int64),
        ("width", c_int64),
        ("index", c_int64),
        ("layer", c_int64),
        ("limit", c_int64),
        ("a", c_float),
        ("b", c_float),
        ("epilogue", c_int32),
        ("unused", c_int32),
    )


class Program:
    """Holds the recording, and with it every weight that a node points to."""

    __slots__ = ("_array", "_recording", "arena_bytes", "max_rows", "num_nodes", "ptr", "result_at", "width")

    def __init__(self, recording: Recording, max_rows: int, carried: Value) -> None:
        """`carried` is the one value that lives in the carry: a forward's result, a head's source."""
        layout = lay_out(recording, max_rows, frozenset({carried}))

        def place(value: Value) -> PlaceStruct:
            root = value.root
            space = IN_CARRY if root is carried else IN_ARENA
            at = (0 if root is carried else layout.offsets[root]) + FLOAT_BYTES * value.first
            return PlaceStruct(space, at, value.ld)

        self._recording = recording
        self._array = (NodeStruct * len(recording.nodes))()
        for struct, node in zip(self._array, recording.nodes, strict=True):
            _encode(struct, node, place)
        self.ptr = ctypes.addressof(self._array)
        self.num_nodes = len(recording.nodes)
        self.max_rows = max_rows
        self.arena_bytes = layout.num_bytes
        self.result_at = layout.offsets.get(recording.result, 0)
        self.width = recording.result.width


def _encode(struct: NodeStruct, node: Node, place: Callable[[Value], PlaceStruct]) -> None:
    struct.op = int(node.op)
    for name, value in zip(("x", "y", "z"), node.inputs, strict=False):
        setattr(struct, name, place(value))
    if node.table is not None:
        struct.x = PlaceStruct(AT_ADDRESS, node.table.ptr, node.table.width)
    if node.output is not None:
        struct.logit_rows = int(node.output.of_logits)
        struct.to = place(node.output)
    struct.weight = None if node.weight is None else node.weight.ptr
    struct.vector = None if node.vector is None else node.vector.ptr
    for name in ("count", "width", "index", "layer", "limit", "a", "b"):
        setattr(struct, name, getattr(node, name))
    struct.epilogue = int(node.epilogue)
