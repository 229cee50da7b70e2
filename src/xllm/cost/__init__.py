"""How long work takes: step-time and transfer models that engine, service and simulator share.

Arithmetic over numbers that the caller measured. No clock, no I/O, no decision: who compares two
predictions is a policy and lives in its own room.
"""

from xllm.cost.beside import rows_beside
from xllm.cost.fit import CostFitter
from xllm.cost.step import StepCost, attention_work
from xllm.cost.transfer import TransferCost, TransferFitter

__all__ = ["CostFitter", "StepCost", "TransferCost", "TransferFitter", "attention_work", "rows_beside"]
