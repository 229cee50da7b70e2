"""llama.cpp's server on a GGUF file, as the package built it for this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.compare.adapters.context import Context, Missing, fill, installed
from benchmarks.compare.engine import Launch
from benchmarks.compare.settings import PEERS, Entry

_BINARY = "llama-server"


def launch(entry: Entry, context: Context) -> Launch:
    binary = _binary(installed(context, "llama.cpp").parent.parent)
    weights = context.weights(entry, gguf=True)
    port = context.port()
    flags = fill(entry.flags, context.words(port, weights))
    return Launch(
        command=(str(binary), *flags),
        # Its libraries lie beside it or in the package's lib folder, without a run path.
        env={"LD_LIBRARY_PATH": ":".join(_library_folders(binary))},
        port=port,
        about={"version": PEERS["llama.cpp"].requirement, "flags": " ".join(flags)},
    )


def _binary(environment: Path) -> Path:
    found = [p for p in environment.rglob(_BINARY) if p.is_file() and p.read_bytes()[:4] == b"\x7fELF"]
    if not found:
        raise Missing(f"no {_BINARY} in {environment}; remove that folder and run make bench-peers")
    return found[0]


def _library_folders(binary: Path) -> list[str]:
    """Folders with its shared libraries, links of the wanted names made where the package lacks them."""
    root = binary.parent.parent
    libraries = [p for p in root.rglob("lib*.so*") if p.name.startswith(("libllama", "libggml", "libmtmd"))]
    for library in libraries:
        _link_soname(library)
    return sorted({str(library.parent) for library in libraries})


def _link_soname(library: Path) -> None:
    """A wheel holds no links: `libllama.so.0.1` must be found as `libllama.so.0` too."""
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=False)
    for line in dynamic.stdout.splitlines():
        if "(SONAME)" in line:
            link = library.with_name(line.rpartition("[")[2].rstrip("] "))
            if not link.exists():
                link.symlink_to(library.name)
