"""What the documents say exists, exists; numbers that stand twice agree."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import tools.install_torch as install_torch
import tools.stages as stages
from tests.null.repo import PACKAGE, ROOT, tree
from xllm.cli.main import COMMANDS
from xllm.version import __version__

REFERENCE = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.py):([\w.]+)`")


def references() -> list[tuple[str, str]]:
    return sorted(set(REFERENCE.findall((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))))


def defined(path: Path) -> set[str]:
    """Dotted names of all functions, classes and constants of a module."""
    found: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
            elif isinstance(node, ast.ClassDef):
                found.add(prefix + node.name)
                walk(node.body, prefix + node.name + ".")
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)

    walk(tree(path).body, "")
    return found


def test_the_architecture_names_the_life_of_a_request() -> None:
    assert len(references()) >= 12


@pytest.mark.parametrize(("file", "function"), references())
def test_every_reference_in_the_architecture_exists(file: str, function: str) -> None:
    path = PACKAGE / file
    assert path.is_file(), f"ARCHITECTURE.md names {file}, which does not exist"
    assert function in defined(path), f"{file} has no {function}"


def test_links_between_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{document.name} → {target}"
        for document in documents
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text(encoding="utf-8"))
        if not (document.parent / target).exists()
    ]
    assert broken == []


def commands_in(document: str) -> list[str]:
    """Lines of the fenced shell blocks, without prompts and comments."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"])
def test_documented_commands_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for line in commands_in(document):
        if match := re.match(r"(?:[A-Z_]+=\S+ )*make ([a-z-]+)", line):
            assert match[1] in targets, line
        if match := re.match(r"(?:\.venv/bin/)?xllm ([a-z-]+)", line):
            assert match[1] in COMMANDS, line


def test_the_readme_shows_the_two_commands() -> None:
    lines = commands_in("README.md")
    assert "make serve" in lines
    assert "make test" in lines


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/xllm/version.py"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(__version__)}\b", changelog, flags=re.MULTILINE)


def test_stage_budgets_fit_and_are_those_of_the_contributing_page() -> None:
    assert sum(stage.budget_s for stage in stages.STAGES) <= stages.TOTAL_BUDGET_S == 600
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = {
        name: int(budget) for name, budget in re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", page, re.MULTILINE)
    }
    assert rows == {stage.name: stage.budget_s for stage in stages.STAGES}


def test_torch_is_pinned_once_and_never_the_large_build_on_linux() -> None:
    pins = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    version = install_torch.TORCH_VERSION
    assert pins == [
        f'torch=={version}+cpu ; sys_platform == "linux"',
        f'torch=={version} ; sys_platform != "linux"',
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["torch"] == [f"torch=={version}"]
    assert install_torch.wanted("linux", "cpu") == f"torch=={version}+cpu"
    assert install_torch.wanted("linux", "default") == f"torch=={version}"
    assert install_torch.wanted("darwin", "cpu") == f"torch=={version}"


def test_the_runtime_needs_neither_torch_nor_transformers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\s<>=!\[;]", requirement)[0].lower() for requirement in project["dependencies"]}
    assert not names & {"torch", "transformers", "vllm", "ray", "diskcache", "pickle5"}


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    names = {re.split(r"[<>=!\[; ]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names - pinned == set()
