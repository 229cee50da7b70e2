"""Executors turn a plan into a result: in this process, or (later) fanned out over ranks."""

from xllm.engine.executor.base import Executor
from xllm.engine.executor.inproc import InProcExecutor

__all__ = ["Executor", "InProcExecutor"]
