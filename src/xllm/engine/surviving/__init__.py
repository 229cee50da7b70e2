"""KV pages in memory that outlives the engine's process, with what is needed to believe them afterwards."""

from xllm.engine.surviving.adopt import Adopted, adopt
from xllm.engine.surviving.keeper import Keeper
from xllm.engine.surviving.memory import SharedPages

__all__ = ["Adopted", "Keeper", "SharedPages", "adopt"]
