"""Memory touched ahead of its use."""

from __future__ import annotations

import numpy as np
import pytest

from xllm.engine.kernels.native.prefault import Prefault

MIB = 1 << 20


def touched(size: int, margin: int, uses: tuple[int, ...] = ()) -> tuple[int, np.ndarray]:
    memory = np.zeros(size, dtype=np.uint8)
    memory[5 * MIB] = 9
    prefault = Prefault(memory, margin)
    if not prefault.wait():
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    for end in uses:
        prefault.use(end)
    count = prefault.wait()
    prefault.close()
    return count, memory


def test_a_margin_is_touched_at_start_and_kept_ahead_of_what_is_in_use() -> None:
    count, _ = touched(40 * MIB, 8 * MIB)
    assert count == 8 * MIB
    # Less than half a margin further wakes nobody.
    assert touched(40 * MIB, 8 * MIB, (3 * MIB,))[0] == 8 * MIB
    assert touched(40 * MIB, 8 * MIB, (3 * MIB, 12 * MIB))[0] == 20 * MIB


def test_the_end_of_the_memory_is_the_end_of_the_work() -> None:
    count, memory = touched(20 * MIB, 8 * MIB, (19 * MIB,))
    assert memory.nbytes - 2 * 4096 <= count <= memory.nbytes


def test_what_is_there_stays() -> None:
    _, memory = touched(16 * MIB, 16 * MIB)
    assert memory[5 * MIB] == 9
    assert int(memory.sum()) == 9
