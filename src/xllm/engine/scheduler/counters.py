"""What a scheduler has done so far, and the snapshot made of it. Nothing reads the counts to decide."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.engine.memory.pool import PoolCounts
from xllm.engine.scheduler.load import Load
from xllm.types import EngineSnapshot


@dataclass(slots=True)
class Counters:
    """Written by the scheduler. Prefix and token counts are in tokens."""

    num_accepted: int = 0
    num_ended: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0

    def snapshot(
        self,
        *,
        step: int,
        num_running: int,
        num_waiting: int,
        num_requests: int,
        pages: PoolCounts,
        load: Load,
    ) -> EngineSnapshot:
        return EngineSnapshot(
            step=step,
            num_running=num_running,
            num_waiting=num_waiting,
            num_requests=num_requests,
            total_pages=pages.total,
            free_pages=pages.free,
            cached_pages=pages.reusable,
            owned_pages=pages.owned,
            transfer_pages=pages.in_transfer,
            num_accepted=self.num_accepted,
            num_ended=self.num_ended,
            num_preemptions=self.num_preemptions,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            backlog_tokens=load.backlog_tokens,
            num_decoding=load.num_decoding,
            decode_context=load.decode_context,
        )
