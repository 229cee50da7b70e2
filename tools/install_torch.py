"""Puts the pinned torch into the running environment: the CPU build on Linux, never CUDA by accident.

On Linux the default index serves torch with every CUDA library as a dependency (several
gigabytes). Only an index or directory of CPU builds carries the local version `+cpu`, so asking for
exactly that version either finds the small wheel or fails; it cannot fall back to the large one.

    python tools/install_torch.py                 # CPU build from the indexes pip is configured with
    TORCH_INDEX=URL python tools/install_torch.py # ... or from this index (see pytorch.org, "CPU")
    TORCH_BUILD=default python tools/install_torch.py  # whatever the default index has, CUDA included
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

TORCH_VERSION = "2.13.0"

REFUSAL = f"""
xllm: no CPU build of torch {TORCH_VERSION} was found where pip looks, and the default build for Linux
brings several gigabytes of CUDA libraries, so nothing was installed. Choose one:
  * name an index with CPU builds (pytorch.org, "Get started", compute platform CPU, shows its address):
        TORCH_INDEX=<address> make test-setup
  * take the large default build (for a machine with an NVIDIA GPU):
        TORCH_BUILD=default make test-setup
  * or install torch {TORCH_VERSION} into .venv yourself and run make again.
"""


def wanted(platform: str, build: str) -> str:
    """The requirement for this machine. macOS and Windows wheels have no CUDA and no `+cpu` tag."""
    if platform == "linux" and build != "default":
        return f"torch=={TORCH_VERSION}+cpu"
    return f"torch=={TORCH_VERSION}"


def installed() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    have = installed()
    if have is not None and have.split("+")[0] == TORCH_VERSION:
        print(f"torch {have}: already there")
        return 0
    build = os.environ.get("TORCH_BUILD", "cpu")
    requirement = wanted(sys.platform, build)
    command = [sys.executable, "-m", "pip", "install", "--quiet", requirement]
    if build != "default":
        command += ["--constraint", "constraints.txt"]
    index = os.environ.get("TORCH_INDEX")
    if index:
        command += ["--extra-index-url", index]
    print(f"installing {requirement}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0 and build != "default":
        print(REFUSAL, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
