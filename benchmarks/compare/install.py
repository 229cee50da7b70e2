"""Puts each peer into a virtual environment of its own. May be repeated; what is there is kept.

python -m benchmarks.compare.install --peers-dir .peers [PEER ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

from benchmarks.compare.settings import PEERS, Package
from tools.install_torch import TORCH_VERSION, wanted

_REQUIREMENTS = """
import importlib.metadata, json, re, sys
from pip._vendor.packaging.requirements import Requirement
wanted = map(Requirement, importlib.metadata.requires(sys.argv[1]) or [])
print(json.dumps([[r.name.lower(), str(r).partition(";")[0].strip()] for r in wanted
                  if r.marker is None or r.marker.evaluate({"extra": ""})]))
"""


def python_of(peers_dir: Path, peer: str) -> Path:
    """The interpreter of a peer's environment, whether or not it is there."""
    return peers_dir / peer / "bin" / "python"


def stamp_of(peers_dir: Path, peer: str) -> Path:
    """Written last: its presence means that the installation was completed."""
    return peers_dir / peer / ".installed"


def install(peers_dir: Path, peer: str, package: Package, num_jobs: int) -> None:
    """One peer. Raises CalledProcessError when pip fails."""
    stamp = stamp_of(peers_dir, peer)
    if stamp.exists() and stamp.read_text(encoding="utf-8").strip() == package.requirement:
        print(f"{peer}: {package.requirement} is already there")
        return
    python = python_of(peers_dir, peer)
    if not python.exists():
        venv.create(peers_dir / peer, with_pip=True)
    if package.needs_torch:
        _pip(python, wanted(sys.platform, os.environ.get("TORCH_BUILD", "cpu")), *_torch_index())
    if package.leave_out:
        _pip(python, package.requirement, "--no-deps")
        _pip(python, *_dependencies(python, package))
    else:
        env = {name: value.format(jobs=num_jobs) for name, value in package.build_env.items()}
        _pip(python, package.requirement, env=env)
    if package.completed_by:
        subprocess.run([str(python), "-c", f"import {package.completed_by}"], check=True)
    stamp.write_text(package.requirement + "\n", encoding="utf-8")


def _dependencies(python: Path, package: Package) -> list[str]:
    """The package's own list without what it can do without, and without torch, which is there."""
    name = package.requirement.partition("==")[0]
    found = subprocess.run(
        [str(python), "-c", _REQUIREMENTS, name], check=True, capture_output=True, text=True
    ).stdout
    skipped = {"torch", *package.leave_out}
    return [requirement for short, requirement in json.loads(found) if short not in skipped]


def _torch_index() -> list[str]:
    index = os.environ.get("TORCH_INDEX")
    return ["--extra-index-url", index] if index else []


def _pip(python: Path, *words: str, env: Mapping[str, str] | None = None) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *words]
    print("+", " ".join(command[2:8]), "..." if len(command) > 8 else "", flush=True)
    subprocess.run(command, check=True, env=os.environ | dict(env or {}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers-dir", type=Path, default=Path(".peers"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once [all cores]")
    parser.add_argument("peer", nargs="*", choices=[[], *PEERS], help="default: all")
    args = parser.parse_args()
    failed = []
    for peer in args.peer or PEERS:
        try:
            install(args.peers_dir, peer, PEERS[peer], args.jobs)
        except (OSError, subprocess.CalledProcessError) as error:
            # The others are still worth having: the comparison says which one is missing.
            print(f"{peer}: not installed: {error}", file=sys.stderr)
            failed.append(peer)
    print(f"torch for peers that need it: {TORCH_VERSION}; missing peers: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
