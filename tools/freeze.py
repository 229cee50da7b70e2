"""Writes constraints.txt: the exact versions, installed here, of everything `xllm[test]` needs.

Run it through `make freeze` after changing dependencies in pyproject.toml and trying them out.
"""

from __future__ import annotations

import importlib.metadata as metadata
import pathlib
import re
import sys
import tomllib

from packaging.requirements import Requirement

HEADER = """\
# Exact versions of everything that `pip install -e .[test]` brings; written by `make freeze`.
# On Linux torch is pinned to the CPU build: with this file pip can find that one or fail, but never
# take the build that depends on gigabytes of CUDA libraries (tools/install_torch.py says how to ask for it).
"""
TORCH = 'torch==2.13.0+cpu ; sys_platform == "linux"\ntorch==2.13.0 ; sys_platform != "linux"\n'


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(roots: list[Requirement]) -> dict[str, str]:
    """Name → version of every installed distribution reachable from `roots`."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(roots)
    while todo:
        requirement = todo.pop()
        key = (canonical(requirement.name), frozenset(requirement.extras))
        if key in seen or key[0] == "torch":
            continue
        seen.add(key)
        distribution = metadata.distribution(requirement.name)
        found[key[0]] = distribution.version
        for text in distribution.requires or ():
            child = Requirement(text)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(child)
    return found


def main() -> int:
    root = pathlib.Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    roots = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["test"]]
    # What torch itself needs is installed with the same constraints.
    torch_needs = [Requirement(text) for text in metadata.requires("torch") or ()]
    roots += [r for r in torch_needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    lines = [f"{name}=={version}\n" for name, version in sorted(closure(roots).items())]
    (root / "constraints.txt").write_text(HEADER + "".join(lines) + TORCH)
    print(f"constraints.txt: {len(lines) + 1} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
