"""What packed weights take, by their shapes: the sizes of `native/src/pack.cpp`, and the peak of packing.

Sizes only; a test holds them against what the library packs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from xllm.engine.fitting import Part
from xllm.engine.fitting.plan import MIB
from xllm.engine.kernels.native.packing import WeightClass
from xllm.engine.model.definition import Param

_PANEL = 16
"""Outputs that are packed together."""
_GROUP = 32
_LINE = 64
_BLOCK_BYTES = 32 * MIB
_HUGE_BYTES = 2 * MIB
_MAX_CHANNEL_INPUTS = 1 << 16

_BITS = {"bf16": 16, "w8g32": 8, "w4g32": 4, "w8a8": 8}

CodesOf = Callable[[str], tuple[int, int] | None]
"""Tensor → (bits, columns of a group) of the codes that are kept of it; None = it is kept as values."""

_BYTES_READ = {"codes": 6, "one": 8, "joined": 12}
"""Per weight while a parameter is packed: as stored and as float32, for a moment twice; several tensors are
joined, which makes one more copy; codes are bytes and are taken apart. Seen: 3.4 for codes, 7.2 for one."""


def weight_parts(
    params: Sequence[Param],
    classes: tuple[WeightClass, WeightClass],
    codes_of: CodesOf | None,
    *,
    kept: bool,
    found: bool,
) -> tuple[tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]:
    """(shared, own, while loading). `classes` of linears and of tables; `codes_of` where codes are kept as
    the file has them. `kept`: in a file that all engines map; `found`: it is there already."""
    sizes = [packed_bytes(param, classes, codes_of) for param in params]
    size, peak = sum(sizes), _packing_peak(params, sizes, codes_of)
    # Blocks of huge pages: the last one of each is not full.
    large = sum(size > _BLOCK_BYTES for size in sizes)
    private = size + _HUGE_BYTES * (1 + large + size // _BLOCK_BYTES)
    if not kept:
        beyond = Part("packing", max(0, peak - size), "the largest weight as stored and as values")
        return (), (Part("weights", private, "packed, in memory of each engine"),), (beyond,)
    mapped = Part("weights", size, "packed, one file that all engines map")
    if found:
        return (mapped,), (), ()
    return (mapped,), (), (Part("packing", max(private, peak - size), "beside the file until it is written"),)


def _packing_peak(params: Sequence[Param], sizes: Sequence[int], codes_of: CodesOf | None) -> int:
    """Parameters are packed one after the other: all before, and one as it is read."""
    peak = done = 0
    for param, size in zip(params, sizes, strict=True):
        done += size
        kind = "one" if len(param.sources) == 1 and not param.pad_rows else "joined"
        if param.kind != "vector" and codes_of is not None and all(map(codes_of, param.sources)):
            kind = "codes"
        peak = max(peak, done + _BYTES_READ[kind] * math.prod(_shape(param)))
    return peak


def packed_bytes(param: Param, classes: tuple[WeightClass, WeightClass], codes_of: CodesOf | None) -> int:
    """At most; exact but for formats whose scales take two bytes or that have no mins."""
    rows, *rest = _shape(param)
    if param.kind == "vector":
        return 4 * math.prod((rows, *rest)) + _LINE
    columns = rest[0]
    codes = [None if codes_of is None else codes_of(name) for name in param.sources]
    kinds = [kind for kind in codes if kind is not None]
    if len(kinds) == len(codes):
        # Parts with fewer bits are widened to those of their neighbours.
        return _matrix(rows, columns, max(bits for bits, _ in kinds), min(group for _, group in kinds), 2)
    name = classes[0 if param.kind == "matrix" else 1]
    if columns % _GROUP or (name == "w8a8" and columns > _MAX_CHANNEL_INPUTS):
        name = "bf16"
    if name == "bf16":
        return _matrix(rows, columns, 16, 0, 0)
    if name == "w8a8":
        return _matrix(rows, columns, 8, columns, 1)
    return _matrix(rows, columns, _BITS[name], _GROUP, 2)


def _matrix(rows: int, columns: int, bits: int, group: int, per_group: int) -> int:
    """`per_group`: float32 scales and mins of a group of columns and an output."""
    padded = -(-columns // _GROUP) * _GROUP
    scales = 0 if group == 0 else -(-padded // group) * per_group
    panel = padded * _PANEL * bits // 8 + scales * _PANEL * 4
    return -(-panel // _LINE) * _LINE * -(-rows // _PANEL)


def _shape(param: Param) -> tuple[int, ...]:
    rows = sum(shape[0] for shape in param.shapes)
    return (-(-rows // _PANEL) * _PANEL if param.pad_rows else rows, *param.shapes[0][1:])
