"""What the core needs of whatever runs a step. No scheduling here."""

from __future__ import annotations

from typing import Protocol

from xllm.engine.plan import StepPlan, StepResult


class Executor(Protocol):
    """Steps run in the order in which they were submitted, one after the other."""

    @property
    def depth(self) -> int:
        """Plans that may be submitted before the first of them is collected: 1, or 2 where the next step may
        be handed over while one runs."""

    def submit(self, plan: StepPlan) -> None:
        """Run the plan when those before it have run; returns without waiting for it where it can.

        A plan behind another one may have pending tokens. Raises only when the device itself is lost.
        """

    def collect(self) -> StepResult:
        """The result of the oldest plan that was submitted and not collected; waits for it.

        A failure in one sequence's part is that sequence's `error`. Where a step failed as a whole and was
        run again in parts, what was submitted behind it is `dropped`: its tokens may have been pending.
        Raises only when the device itself is lost.
        """

    def execute(self, plan: StepPlan) -> StepResult:
        """`submit` and `collect` of one plan; nothing else is under way.

        Running the same plan, or parts of it, again is harmless: rows write the same KV.
        """

    def close(self) -> None:
        """Give back device memory; idempotent."""
