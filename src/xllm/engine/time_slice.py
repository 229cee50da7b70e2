"""How the kernel shares the cores between a step and everybody else: the step's threads may be interrupted.

A step keeps all cores of a small machine busy for milliseconds. With the usual slice, whoever wakes meanwhile
(the front with a request, a client that its first token has reached) waits until a step thread's slice is
over; with a long one, a waking thread of the usual slice runs at once. Shares and priority stay equal.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys

SLICE_NS = 100_000_000
"""The longest that Linux grants (kernel/sched/syscalls.c)."""

_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
_SCHED_ATTR = struct.Struct("=IIQiIQQQII")
"""size, policy, flags, nice, priority, runtime, deadline, period, util_min, util_max (sched_setattr(2));
policy 0 is SCHED_OTHER, whose runtime is the slice, since Linux 6.12."""


def ask_long_slice() -> bool:
    """For the calling thread and all that it starts from now on. False = this system cannot do it.

    Older kernels take the call and ignore the slice; `granted_slice_ns` tells.
    """
    return _ask(SLICE_NS)


def ask_usual_slice() -> bool:
    """Takes `ask_long_slice` back, for the calling thread and what it starts from now on."""
    return _ask(0)


def _ask(slice_ns: int) -> bool:
    calls = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
    if calls is None:
        return False
    wish = _SCHED_ATTR.pack(_SCHED_ATTR.size, 0, 0, 0, 0, slice_ns, 0, 0, 0, 0)
    return bool(ctypes.CDLL(None).syscall(calls[0], 0, ctypes.c_char_p(wish), 0) == 0)


def granted_slice_ns() -> int | None:
    """The calling thread's slice; None where it cannot be asked, 0 where kernels do not tell it."""
    calls = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
    if calls is None:
        return None
    found = ctypes.create_string_buffer(_SCHED_ATTR.size)
    if ctypes.CDLL(None).syscall(calls[1], 0, found, _SCHED_ATTR.size, 0) != 0:
        return None
    return int(_SCHED_ATTR.unpack(found.raw)[5])
