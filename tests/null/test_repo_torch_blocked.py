"""Everything but the torch platforms imports, and answers `--help`, on a machine without torch."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.null.repo import PACKAGE, sources

TORCH_ROOMS = ("engine/kernels/reference/", "engine/platform/cpu.py", "engine/platform/cuda.py")

PROBE = """
import importlib, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers"}:
            raise ModuleNotFoundError(f"{name} is blocked by this test", name=name)

sys.meta_path.insert(0, Blocked())
failed = {}
for name in json.load(sys.stdin):
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = repr(error)
json.dump(failed, sys.stdout)
"""


def test_every_module_outside_the_torch_rooms_imports_with_torch_blocked() -> None:
    modules = []
    for path in sources():
        relative = path.relative_to(PACKAGE).as_posix()
        if relative.startswith(TORCH_ROOMS) or relative.endswith("__main__.py"):
            continue
        modules.append("xllm." + relative.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    modules = [module.removesuffix(".__init__") for module in modules]
    assert {"xllm.engine.core", "xllm.cli.main", "xllm.wire.messages"} <= set(modules)
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=json.dumps(modules), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {}


def test_importing_the_package_is_light() -> None:
    """`import xllm` must not drag in the server, numpy or torch: users import it for one name."""
    code = "import sys, xllm; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {
        "torch",
        "transformers",
        "numpy",
        "starlette",
        "uvicorn",
        "tokenizers",
    }
