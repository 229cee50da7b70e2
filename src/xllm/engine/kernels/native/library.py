"""The C ABI as ctypes sees it: one table of signatures, and the choice of the library to open.

Pointers are plain ints, so that a call converts nothing. ctypes releases the GIL during every call.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from xllm.engine.kernels.native.isa import cpu_flags, find_library, usable
from xllm.errors import InternalError

ABI_VERSION = 3
ERROR_MEMORY = 1
STOPPED = 3
"""No error: a program came to the end of a layer and was asked to stop there."""
ASKS = 4
"""No error: a job's logits are there, and the caller draws from them."""
DROPPED = 5
"""A job was not begun, because the one before it failed."""

CLASS_NAMES = {1: "bf16", 2: "w8g32", 3: "w4g32", 4: "w8g16", 5: "w8a8"}

_P, _I, _L, _F = c_void_p, c_int32, c_int64, c_float

SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "xn_abi_version": (_I, ()),
    "xn_isa": (c_char_p, ()),
    "xn_pool_create": (_P, (_I,)),
    "xn_pool_destroy": (None, (_P,)),
    "xn_pool_size": (_I, (_P,)),
    "xn_pack_bf16": (_I, (_P, _P, _L, _L, _P)),
    "xn_pack_w8g32": (_I, (_P, _P, _P, _P, _L, _L, _P)),
    "xn_pack_w4g32": (_I, (_P, _P, _P, _P, _L, _L, _P)),
    "xn_pack_w8g16": (_I, (_P, _P, _P, _P, _L, _L, _P)),
    "xn_pack_w8a8": (_I, (_P, _P, _P, _L, _L, _P)),
    "xn_quantize_w8a8": (_I, (_P, _P, _L, _L, _P)),
    "xn_quantize_w8g32": (_I, (_P, _P, _L, _L, _P)),
    "xn_quantize_w4g32": (_I, (_P, _P, _L, _L, _P)),
    "xn_matrix_free": (None, (_P,)),
    "xn_matrix_class": (_I, (_P,)),
    "xn_matrix_num_out": (_L, (_P,)),
    "xn_matrix_num_in": (_L, (_P,)),
    "xn_matrix_bytes": (_L, (_P,)),
    "xn_matrix_record_bytes": (_L, ()),
    "xn_matrix_record": (_I, (_P, _P)),
    "xn_matrix_panels": (_P, (_P,)),
    "xn_matrix_over": (_I, (_P, _L, _P, _L, _P)),
    "xn_matrix_rows": (_I, (_P, _P, _L, _P, _L)),
    "xn_linear": (_I, (_P, _P, _P, _L, _L, _P, _P, _L)),
    "xn_rounded_stride": (_L, (_P,)),
    "xn_round_rows": (_I, (_P, _P, _P, _L, _L, _P)),
    "xn_rms_norm_rounded": (_I, (_P, _P, _P, _L, _L, _P, _F, _F, _P)),
    "xn_linear_fused": (_I, (_P, _P, _P, _P, _L, _L, _P, _I, _P, _L, _P, _L)),
    "xn_multiply": (_L, (_I, _L)),
    "xn_read_memory": (_L, (_P, _P, _L)),
    "xn_embedding": (_I, (_P, _P, _P, _L, _F, _P, _L)),
    "xn_rms_norm": (_I, (_P, _P, _L, _L, _L, _L, _P, _F, _F, _P, _L)),
    "xn_add": (_I, (_P, _P, _L, _P, _L, _L, _L, _P, _L)),
    "xn_silu_mul": (_I, (_P, _P, _L, _L, _L, _P, _L)),
    "xn_gelu_tanh_mul": (_I, (_P, _P, _L, _L, _L, _P, _L)),
    "xn_softcap": (_I, (_P, _P, _L, _L, _L, _F, _P, _L)),
    "xn_rope": (_I, (_P, _P, _L, _L, _L, _L, _P, _P, _L, _P, _L)),
    "xn_select_rows": (_I, (_P, _P, _L, _P, _L, _L, _P, _L)),
    "xn_attention": (_I, (_P, _P, _P, _L, _P, _L, _P, _L, _P, _L, _F, _F, _P, _L)),
    "xn_attention_items": (_L, (_P, _P, _L)),
    "xn_step_create": (_P, (_P, _L)),
    "xn_step_destroy": (None, (_P,)),
    "xn_step_set": (_I, (_P, _P, _L, _L)),
    "xn_program_run": (_I, (_P, _P, _L, _P, _L, _P, _P, _P, _P, _P)),
    "xn_queue_create": (_P, (_P,)),
    "xn_queue_destroy": (None, (_P,)),
    "xn_queue_submit": (_I, (_P, _P)),
    "xn_queue_wait": (_I, (_P,)),
    "xn_queue_go_on": (_I, (_P, _I)),
    "xn_sample_bytes": (_L, (_P, _L)),
    "xn_sample": (_I, (_P, _P, _L, _L, _P, _P, _P, _P)),
}


class AttentionPlanStruct(ctypes.Structure):
    """`xn_attention_plan`."""

    _fields_ = (
        ("spans", _P),
        ("num_spans", _L),
        ("page_table", _P),
        ("num_heads", _L),
        ("num_kv_heads", _L),
        ("head_dim", _L),
        ("num_layers", _L),
        ("window", _L),
        ("num_items", _L),
        ("items", _P),
        ("kv_class", _L),
    )


def open_library(path: Path) -> ctypes.CDLL:
    """Load it, declare every function, check the ABI. Raises OSError, InternalError."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name, None)
        if function is not None:
            function.restype, function.argtypes = result, arguments
    if library.xn_abi_version() != ABI_VERSION:
        raise InternalError(f"{path.name} has another ABI than this package")
    return library


def find(names: frozenset[str] | None = None) -> tuple[Path | None, str]:
    """(library for the best path this CPU can run and that is built, its name) or (None, the reason).

    `names` restricts the choice to these paths.
    """
    able = [isa for isa in usable(cpu_flags()) if names is None or isa.name in names]
    for isa in able:
        path = find_library(isa)
        if path is not None:
            return path, isa.name
    if not able:
        return None, "this CPU has none of the instruction sets asked for"
    return None, (
        "the native kernels are not built (no compiler, or changed sources); "
        "`python -m xllm.engine.kernels.native.build` builds them"
    )


def check(code: int) -> None:
    """Raise what a kernel's return code stands for."""
    if code == ERROR_MEMORY:
        raise MemoryError("the native kernels could not get memory")
    if code:
        raise InternalError("the native kernels refused a call")
