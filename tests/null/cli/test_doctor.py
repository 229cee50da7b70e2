"""`xllm doctor` on a machine without torch: says what is missing, why it matters and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROBE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("blocked", name="torch")

sys.meta_path.insert(0, Blocked())
from xllm.cli.main import main
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def doctor(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"XLLM_CACHE_DIR": str(cache), "XLLM_API_KEY": "very-secret", "PATH": ""}
    return subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=60,
    )


def test_without_torch_the_reason_stands_beside_each_platform(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    lines = [line.strip() for line in done.stdout.splitlines()]
    # The native kernels need no torch; whether they are built here is not this test's matter.
    assert done.returncode == (0 if "native: can be used" in lines else 1), done.stderr
    assert any(line.startswith("cpu: no: torch is not installed") for line in lines)
    assert "null: can be used" in lines


def test_names_of_settings_are_shown_and_values_are_not(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    assert "XLLM_API_KEY" in done.stdout
    assert "very-secret" not in done.stdout


def test_a_model_that_is_not_here_is_told_with_the_remedy(tmp_path: Path) -> None:
    done = doctor(tmp_path, "smollm2")
    assert done.returncode == 1
    assert "xllm pull smollm2" in done.stdout
