"""The C header's structs of steps and queues as ctypes sees them. What must not live here: who fills them."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

from xllm.engine.kernels.native.handles import Pages
from xllm.types import KVGroup


class ControlStruct(ctypes.Structure):
    """`xn_control`."""

    _fields_ = (
        ("finished_layers", c_int32),
        ("_1", c_int32 * 15),
        ("stop", c_int32),
        ("stop_after", c_int32),
        ("_2", c_int32 * 14),
    )


class KVGroupStruct(ctypes.Structure):
    """`xn_kv_group`."""

    _fields_ = (
        ("pages", c_void_p),
        *((n, c_int64) for n in (
            "num_pages", "num_heads", "num_kv_heads", "head_dim", "num_layers", "window",
            "kv_class",
        )),
    )  # fmt: skip


class CopyStruct(ctypes.Structure):
    """`xn_copy`."""

    _fields_ = (("to", c_void_p), ("from_", c_void_p), ("bytes", c_int64))


class PendingStruct(ctypes.Structure):
    """`xn_pending`."""

    _fields_ = (("row", c_int64), ("token", c_int64))


class SliceStruct(ctypes.Structure):
    """`xn_slice`."""

    _fields_ = (
        ("nodes", c_void_p),
        ("num_nodes", c_int64),
        ("num_rows", c_int64),
        ("hidden", c_void_p),
        ("draws", c_void_p),
        ("num_draws", c_int64),
        ("status", c_void_p),
        ("asks", c_int64),
    )


class JobStruct(ctypes.Structure):
    """`xn_job`."""

    _fields_ = (
        ("copies", c_void_p),
        ("num_copies", c_int64),
        ("step", c_void_p),
        ("nodes", c_void_p),
        ("num_nodes", c_int64),
        ("arena", c_void_p),
        ("carry", c_void_p),
        ("control", c_void_p),
        ("stamps", c_void_p),
        ("pending", c_void_p),
        ("num_pending", c_int64),
        ("drawn", c_void_p),
        ("num_drawn", c_int64),
        ("slices", c_void_p),
        ("num_slices", c_int64),
        ("choices", c_void_p),
        ("vocab", c_int64),
        ("workspace", c_void_p),
        ("tokens", c_void_p),
        ("began_ns", c_int64),
        ("ended_ns", c_int64),
        ("code", c_int32),
        ("unused", c_int32),
    )


def group_struct(group: KVGroup, pages: Pages, num_heads: int) -> Any:
    return KVGroupStruct(
        pages=pages.ptr,
        num_pages=len(pages.array),
        num_heads=num_heads,
        num_kv_heads=group.num_kv_heads,
        head_dim=group.head_dim,
        num_layers=len(group.layers),
        window=group.window or 0,
        kv_class=pages.kv_class,
    )
