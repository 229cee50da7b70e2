"""Build hook: compiles the native kernels into the wheel, so that `pip install .` alone can serve.

Without a C++ compiler the wheel is made without them, and the reference platform serves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent


class NativeKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        subprocess.run([sys.executable, "-m", "xllm.engine.kernels.native.build"], env=env, check=False)
        if any((ROOT / "src/xllm/engine/kernels/native/_lib").glob("*.so")):
            # The libraries are for this machine's architecture; the Python code fits any 3.
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
