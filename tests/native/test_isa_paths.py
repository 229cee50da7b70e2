"""Each instruction-set path holds to its processors: by its code, and by running on an emulated one.

What a path computes is tested elsewhere; here a small C++ program (native/tests/rows.cpp) runs every kernel.
"""

from __future__ import annotations

import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from xllm.engine.kernels.native import isa
from xllm.engine.kernels.native.build import COMPILERS
from xllm.engine.kernels.native.isa import ISAS, SOURCES, Isa, find_library, usable
from xllm.engine.kernels.native.library import CLASS_NAMES, find, open_library

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the paths are those of x86-64")

BY_NAME = {each.name: each for each in ISAS}
EMULATED = {"avx2": "Haswell", "portable": "kvm64"}
"""The least processor of each path; kvm64 has SSE3 and nothing later."""
MIN_EMULATOR = (7, 2)
"""Before it qemu knew no AVX2."""
ARCHITECTURE_1 = "fpu tsc cx8 cmov fxsr mmx sse sse2 syscall nx lm"
ARCHITECTURE_3 = f"{ARCHITECTURE_1} ssse3 sse4_1 sse4_2 popcnt avx avx2 fma f16c bmi1 bmi2 movbe"
AVX512 = f"{ARCHITECTURE_3} avx512f avx512bw avx512dq avx512vl"


def built(name: str) -> Path:
    path = find_library(BY_NAME[name])
    if path is None:
        pytest.skip(f"the {name} kernels are not built here")
    return path


# The choice of a path


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (ARCHITECTURE_1, "portable"),
        (f"{ARCHITECTURE_1} avx", "portable"),
        (ARCHITECTURE_3.replace(" fma ", " "), "portable"),
        (ARCHITECTURE_3, "avx2"),
        (AVX512, "avx2"),
        (f"{AVX512} avx512_vnni", "avx2"),
        (f"{AVX512} avx512_vnni avx512_bf16", "avx512bf16"),
        (f"{ARCHITECTURE_1} avx512_bf16", "portable"),
    ],
)
def test_a_path_is_chosen_only_if_the_processor_has_all_it_needs(
    flags: str, chosen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = built(chosen)
    if BY_NAME[chosen] not in usable(isa.cpu_flags()):
        pytest.skip(f"this processor cannot open the {chosen} kernels")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    monkeypatch.setattr(isa, "_CPUINFO", cpuinfo)
    assert find() == (path, chosen)
    assert open_library(path).xn_isa().decode() == chosen


# The code of a path

# In 64-bit mode no other instruction begins with these bytes.
VEX, EVEX = ("c4", "c5"), ("62",)
# Under these two escapes is all that came after SSE3 (SSSE3, SSE4, AES, MOVBE, CRC32).
LATER_ESCAPES = ("0f 38", "0f 3a")
PREFIXES = re.compile(r"^(?:(?:66|f2|f3|2e|36|3e|26|64|65|67|4[0-9a-f]) )+")


def instructions(path: Path) -> list[tuple[str, str]]:
    """(bytes in hex, as assembly) of a library's code."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump here (binutils)")
    done = subprocess.run([objdump, "-d", "-w", str(path)], capture_output=True, text=True, check=True)
    rows = (line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 2)
    return [(code.strip(), text) for _, code, text in rows]


def wider(code: str, text: str, name: str) -> bool:
    """Whether an instruction is beyond the least processor of the path."""
    if code.startswith(EVEX) or "zmm" in text or "%k" in text:
        return True
    if name == "avx2":
        return "vpdp" in text  # AVX-VNNI has VEX forms
    opcode = PREFIXES.sub("", code)
    return (
        code.startswith(VEX)
        or "ymm" in text
        or opcode.startswith(LATER_ESCAPES)
        or text.startswith(("popcnt", "lzcnt"))
    )


@pytest.mark.parametrize("name", EMULATED)
def test_a_library_holds_no_instruction_beyond_its_path(name: str) -> None:
    found = instructions(built(name))
    assert len(found) > 10_000
    assert [text for code, text in found if wider(code, text, name)][:5] == []


@pytest.mark.parametrize(("name", "held_to"), [("avx512bf16", "avx2"), ("avx2", "portable")])
def test_the_reading_of_the_code_sees_wider_instructions(name: str, held_to: str) -> None:
    found = instructions(built(name))
    assert sum(wider(code, text, held_to) for code, text in found) > 1000


# Runs on the path's least processor


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native/tests/rows.cpp for the baseline processor."""
    compiler = next((found for each in COMPILERS if (found := shutil.which(each))), None)
    if compiler is None:
        pytest.skip("no C++ compiler here")
    made = tmp_path_factory.mktemp("rows") / "rows"
    source = SOURCES / "tests" / "rows.cpp"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES / 'include'}")
    subprocess.run([compiler, *flags, str(source), "-o", str(made), "-ldl"], check=True)
    return made


def emulator() -> str:
    """`qemu-x86_64`; skips the test where there is none that knows AVX2."""
    found = shutil.which("qemu-x86_64")
    if found is None:
        pytest.skip("no qemu-x86_64 here (qemu-user)")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"version (\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < MIN_EMULATOR:
        pytest.skip(f"this qemu knows no AVX2: {said.splitlines()[0]}")
    return found


def run(program: Path, library: Path, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    # An emulated program that dies leaves its memory in the working directory.
    command = [*before, str(program), str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=program.parent)


def digests(done: subprocess.CompletedProcess[str], path: Isa) -> list[str]:
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == f"isa {path.name}"
    return rest


@pytest.mark.parametrize("path", ISAS, ids=lambda p: p.name)
def test_every_kernel_gives_a_row_the_same_bits_in_any_company(program: Path, path: Isa) -> None:
    if path not in usable(isa.cpu_flags()):
        pytest.skip(f"this processor cannot run the {path.name} kernels")
    found = digests(run(program, built(path.name)), path)
    for kind in CLASS_NAMES.values():
        assert any(line.startswith(f"linear {kind} ") for line in found)


@pytest.mark.parametrize("name", EMULATED)
def test_on_the_least_processor_of_its_path_a_library_gives_the_same_bits(program: Path, name: str) -> None:
    path, processor = BY_NAME[name], [emulator(), "-cpu", EMULATED[name]]
    emulated = digests(run(program, built(name), processor), path)
    if path in usable(isa.cpu_flags()):
        assert emulated == digests(run(program, built(name)), path)


@pytest.mark.parametrize(("name", "processor"), [("avx2", "Nehalem"), ("avx512bf16", "Haswell")])
def test_a_library_dies_on_a_processor_below_its_path(program: Path, name: str, processor: str) -> None:
    done = run(program, built(name), [emulator(), "-cpu", processor])
    assert done.returncode == -signal.SIGILL
