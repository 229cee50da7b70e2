"""Rules of the house that no linter knows: searched in the sources, so that they hold for new files too."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.null.repo import PACKAGE, ROOT, imported_modules, name, sources, tree

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
VENDORS = re.compile(r"\b(cuda|nvidia|rocm|npu|cann|mlu|musa|xpu|mps|tpu)\b", re.IGNORECASE)
VENDOR_ROOMS = ("engine/platform/", "engine/kernels/")
# The name of a platform in help text, or of what a machine has: words, no branch on them.
VENDOR_WORDS = {"config/schema.py", "cli/doctor.py", "engine/kvtransfer/mooncake.py"}
# Third parties that may be missing or are slow to import; everything else is imported at the top.
OPTIONAL = {
    "torch",
    "huggingface_hub",
    "tqdm",
    "triton",
    "rich",
    "yaml",
    "uvicorn",
    "gguf",
    "opentelemetry",
    "psutil",
    "readline",
    "aetcd",
    "grpc",
    "mooncake",
}


def ids(paths: list[Path]) -> list[str]:
    return [name(path) for path in paths]


SOURCES = sources()


def each_source(paths: list[Path] = SOURCES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=ids(paths))


@each_source([path for path in SOURCES if path.read_text().strip()])
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{name(path)} has no module docstring"


@each_source()
def test_nothing_deserialises_code(path: Path) -> None:
    used = {module.split(".")[0] for _, module, _ in imported_modules(path)}
    assert not used & FORBIDDEN_MODULES
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name):
            assert called.id not in FORBIDDEN_CALLS, f"line {node.lineno}"
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            dotted = f"{called.value.id}.{called.attr}"
            assert dotted not in {"yaml.load", "torch.load", "np.load", "numpy.load"}, f"line {node.lineno}"


@each_source([path for path in SOURCES if name(path) != "config/env.py"])
def test_only_one_file_reads_the_environment(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in {"environ", "getenv", "putenv", "environb"}, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv"}, f"line {node.lineno}"


@each_source()
def test_own_packages_are_imported_at_the_top(path: Path) -> None:
    """A late or type-only import hides a cycle; optional third parties are the exception."""
    for line, module, inside in imported_modules(path):
        if inside:
            assert module.split(".")[0] in OPTIONAL, f"line {line}: {module} is imported inside a function"
    guards = [node for node in ast.walk(tree(path)) if isinstance(node, ast.If)]
    for guard in guards:
        if "TYPE_CHECKING" not in ast.unparse(guard.test):
            continue
        for node in ast.walk(guard):
            if isinstance(node, ast.ImportFrom | ast.Import):
                assert "xllm" not in ast.unparse(node), (
                    f"line {node.lineno}: TYPE_CHECKING between our packages"
                )


@each_source([p for p in SOURCES if not name(p).startswith(VENDOR_ROOMS) and name(p) not in VENDOR_WORDS])
def test_vendor_names_stay_in_platforms_and_kernels(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = VENDORS.search(line)
        assert match is None, f"line {number} names {match and match[0]}"


def test_there_is_no_utils_module() -> None:
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert [name(path) for path in SOURCES if path.stem in vague or path.parent.name in vague] == []


def test_packages_stay_shallow() -> None:
    deep = [name(path) for path in SOURCES if len(path.relative_to(PACKAGE.parent).parts) > 5]
    assert deep == [], "a package is deeper than four levels"


def test_no_source_names_a_machine() -> None:
    """Absolute paths of somebody's machine have no place in what we ship."""
    pattern = re.compile(r"(?<![\w.])/(work|root|home/\w+)/")
    texts = [
        path for folder in ("src", "tools", "benchmarks", "docs", "recipes") for path in _texts(ROOT / folder)
    ]
    texts += [path for path in ROOT.glob("*.*") if path.suffix in {".md", ".toml", ".txt"}]
    found = [
        str(path.relative_to(ROOT)) for path in texts if pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def _texts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in {".py", ".md", ".json", ".sh", ".toml"}]
