"""What an engine will take of this machine's memory, known before a weight is read. Arithmetic over facts."""

from xllm.engine.fitting.fit import fit
from xllm.engine.fitting.plan import Demand, MemoryPlan, Part, Room

__all__ = ["Demand", "MemoryPlan", "Part", "Room", "fit"]
