"""An engine process whose steps take a fixed time and no CPU: `python -m benchmarks.overhead.paced --fd N`.

Everything but the runner is the real engine: connection, loop, scheduler, pages, frames. Not for serving.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import sys
import time

import msgspec

from xllm.clock import SystemClock
from xllm.config import SchedulerConfig
from xllm.engine.core import EngineCore
from xllm.engine.executor import InProcExecutor
from xllm.engine.hub import Hub
from xllm.engine.loop import EngineLoop
from xllm.engine.memory.manager import PageManager
from xllm.engine.plan import ChoiceTokens, SampledToken, SequencePlan, SequenceResult, StepPlan, StepResult
from xllm.engine.scheduler.order import create_order
from xllm.engine.scheduler.scheduler import Scheduler
from xllm.testing.null_engine import EOS, FULL, null_card
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.wire.messages import Hello, Ready, Start

NUM_PAGES = 4096
MAX_MODEL_LEN = 4096


class PacedRunner:
    """Waits as a step would, without the interpreter lock, then gives each sequence a token."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def execute(self, plan: StepPlan) -> StepResult:
        if self._step_s:
            time.sleep(self._step_s)
        return StepResult(step=plan.step, sequences=tuple(map(_result, plan.sequences)))

    def close(self) -> None:
        return


def _result(entry: SequencePlan) -> SequenceResult:
    if entry.sample is None:
        return SequenceResult(seq_id=entry.seq_id)
    # Printable tokens of the tiny vocabulary; which ones does not matter.
    token = SampledToken(100 + (entry.start * 7 + entry.seq_id) % 64)
    choices = tuple(ChoiceTokens(choice=c, tokens=(token,)) for c in entry.sample.choices)
    return SequenceResult(seq_id=entry.seq_id, choices=choices)


def paced_core(step_s: float, config: SchedulerConfig) -> tuple[EngineCore, dict[str, bytes]]:
    """A core over the paced runner and the assets that a front asks for."""
    files = tiny_assets(512)
    assets = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
    card = null_card(NUM_PAGES, MAX_MODEL_LEN)
    names = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    card = msgspec.structs.replace(card, model_id="paced", assets=names)
    memory = PageManager((FULL,), [NUM_PAGES], True)
    scheduler = Scheduler(
        config,
        memory,
        create_order("fcfs"),
        numerics_class="paced",
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(EOS,),
    )
    return EngineCore(card, scheduler, memory, InProcExecutor(PacedRunner(step_s)), SystemClock()), assets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--log-level")
    parser.add_argument("--pages-fd", help="not used: there are no pages worth keeping")
    args = parser.parse_args()
    hub = Hub(None, SystemClock())
    session = hub.adopt(socket.socket(fileno=args.fd))
    hub.start()
    session.send(Hello(incarnation="paced"))
    (_, hello), (_, start) = hub.inbox.get(), hub.inbox.get()
    if not isinstance(hello, Hello) or not isinstance(start, Start):
        return 1
    scheduler = start.config.scheduler
    core, assets = paced_core(args.step_ms / 1000, scheduler)
    hub.tell_progress(core.progress)
    ready = Ready(
        card=core.card, pid=os.getpid(), max_reqs=scheduler.max_num_seqs + scheduler.max_num_queued_reqs
    )
    session.send(ready)
    try:
        EngineLoop(core, assets, hub.inbox, ready, parent=session).run()
    finally:
        hub.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
