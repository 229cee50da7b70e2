"""Packs weights for the native kernels: float32 rows into a class, or the codes of a file as they are."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Literal

import numpy as np
import numpy.typing as npt

from xllm.codes import GROUP_SIZE, GroupCodes
from xllm.engine.kernels.native.handles import Matrix
from xllm.engine.kernels.native.library import CLASS_NAMES, check
from xllm.engine.kernels.ops import F32
from xllm.errors import InternalError

Bytes = npt.NDArray[np.uint8]
WeightClass = Literal["bf16", "w8g32", "w4g32", "w8a8"]
"""What float32 rows can be packed as. A file's codes may make a `w8g16` besides."""

_PACKERS = {
    "bf16": "xn_pack_bf16",
    "w8g32": "xn_quantize_w8g32",
    "w4g32": "xn_quantize_w4g32",
    "w8a8": "xn_quantize_w8a8",
}
_CODE_PACKERS = {(8, 32): "xn_pack_w8g32", (4, 32): "xn_pack_w4g32", (8, 16): "xn_pack_w8g16"}
"""By bits and columns of a group."""

_MAX_CHANNEL_INPUTS = 1 << 16
"""Beyond, the integer sum of a `w8a8` row could overflow."""


class Packer:
    """`num_bytes` counts what was packed by class."""

    def __init__(self, library: ctypes.CDLL, pool: int | None) -> None:
        self._lib = library
        self._pool = pool
        self.num_bytes: Counter[str] = Counter()

    def values(self, values: F32, weight_class: WeightClass) -> Matrix:
        """(out, in) in the class; widths that are no multiple of a group or too large stay bf16."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        num_out, num_in = values.shape
        unfit = num_in % GROUP_SIZE or (weight_class == "w8a8" and num_in > _MAX_CHANNEL_INPUTS)
        pack = getattr(self._lib, _PACKERS["bf16" if unfit else weight_class])
        made = ctypes.c_void_p()
        check(pack(self._pool, values.ctypes.data, num_out, num_in, ctypes.addressof(made)))
        return self._counted(made)

    def codes(self, codes: GroupCodes) -> Matrix:
        """The same codes, scales and mins in the order the kernels read them."""
        own = np.ascontiguousarray(codes.codes)
        scales = np.ascontiguousarray(codes.scales, dtype=np.float32)
        mins = None if codes.mins is None else np.ascontiguousarray(codes.mins, dtype=np.float32)
        min_ptr = None if mins is None else mins.ctypes.data
        pack = getattr(self._lib, _CODE_PACKERS[codes.bits, codes.group_size])
        made = ctypes.c_void_p()
        made_ptr = ctypes.addressof(made)
        check(pack(self._pool, own.ctypes.data, scales.ctypes.data, min_ptr, *own.shape, made_ptr))
        return self._counted(made)

    def stored(self, matrix: Matrix) -> tuple[bytes, Bytes]:
        """(record, a view of the panels) of a matrix, for `over`; the view holds the matrix."""
        record = ctypes.create_string_buffer(self._lib.xn_matrix_record_bytes())
        check(self._lib.xn_matrix_record(matrix.ptr, ctypes.addressof(record)))
        num_bytes = self._lib.xn_matrix_bytes(matrix.ptr)
        panels = (ctypes.c_uint8 * num_bytes).from_address(self._lib.xn_matrix_panels(matrix.ptr))
        panels._matrix = matrix
        return record.raw, np.frombuffer(panels, dtype=np.uint8)

    def over(self, record: bytes, panels: Bytes, shape: tuple[int, ...]) -> Matrix:
        """A matrix over panels that stay where they are. Raises InternalError for what no packer makes."""
        made = ctypes.c_void_p()
        made_ptr, address = ctypes.addressof(made), panels.ctypes.data
        check(self._lib.xn_matrix_over(record, len(record), address, panels.nbytes, made_ptr))
        matrix = self._counted(made, panels)
        if (matrix.num_out, matrix.num_in) != shape:
            raise InternalError("a stored matrix has another shape than its entry")
        return matrix

    def _counted(self, made: ctypes.c_void_p, memory: object = None) -> Matrix:
        matrix = Matrix(self._lib, made.value or 0, memory)
        name = CLASS_NAMES[self._lib.xn_matrix_class(matrix.ptr)]
        self.num_bytes[name] += self._lib.xn_matrix_bytes(matrix.ptr)
        return matrix
