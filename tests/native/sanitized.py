"""A pytest plugin: native kernels come from `make sanitize`'s build. `-p tests.native.sanitized`."""

from __future__ import annotations

from pathlib import Path

from xllm.engine.kernels.native import isa
from xllm.engine.kernels.native.library import find

isa.LIBRARIES = Path(__file__).resolve().parents[2] / "build" / "sanitize" / "memory"


def pytest_report_header() -> str:
    path, why = find()
    if path is None:
        raise RuntimeError(why)
    return f"native kernels: {path}"
