"""Minutes of mixed load on the real model: what a request gets does not depend on its company.

The load is that of `benchmarks.soak`, which runs longer and on the native kernels only; here it must pass.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from benchmarks.soak import load, memory_mib, replay, wait_idle
from xllm.testing.server_process import serve

SEED = 20_261_123
LOAD_S = 150.0
NUM_CLIENTS = 12
NUM_REPLAYED = 60


@pytest.mark.robustness
@pytest.mark.timeout(900)
def test_mixed_load_is_exact_and_leaves_nothing(smollm2: str) -> None:
    # Few pages, so that the load lives on preemption and eviction.
    flags = ("--max-model-len", "1024", "--num-pages", "20", "--max-num-seqs", "8")
    with serve(smollm2, *flags, "--max-num-queued-reqs", "8") as server:
        warm = asyncio.run(load(server, "smollm2", 30.0, SEED + 1000, NUM_CLIENTS))
        wait_idle(server)
        before = memory_mib(server)[0]
        seen = asyncio.run(load(server, "smollm2", LOAD_S, SEED, NUM_CLIENTS))
        wait_idle(server)
        after = memory_mib(server)[0]
        num_preemptions = server.metric("vllm:num_preemptions_total")
        hits = server.metric("vllm:prefix_cache_hits_total")
        print(
            f"seed {SEED}: {warm.num_ended + seen.num_ended} answers, {seen.num_left} left, "
            f"{seen.num_refused} refused, {num_preemptions:.0f} preemptions, {hits:.0f} cached tokens, "
            f"RSS {before:.0f} → {after:.0f} MiB"
        )
        assert num_preemptions > 0
        assert hits > 0
        assert seen.num_left > 0
        assert after <= before * 1.05
        replayed = random.Random(SEED).sample(seen.answers, min(NUM_REPLAYED, len(seen.answers)))
        assert replay(server, replayed) == 0
