"""What the core needs of whatever runs a step. No scheduling here."""

from __future__ import annotations

from typing import Protocol

from xllm.engine.plan import StepPlan, StepResult


class Executor(Protocol):
    def execute(self, plan: StepPlan) -> StepResult:
        """Run the step. A failure in one sequence's part is that sequence's `error`.

        Running the same plan, or parts of it, again is harmless: rows write the same KV.
        Raises only when the device itself is lost.
        """

    def close(self) -> None:
        """Give back device memory; idempotent."""
