"""llama.cpp's server on a GGUF file, as the package built it for this machine."""

from __future__ import annotations

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
        # Its libraries lie beside it.
        env={"LD_LIBRARY_PATH": str(binary.parent)},
        port=port,
        about={"version": PEERS["llama.cpp"].requirement, "flags": " ".join(flags)},
    )


def _binary(environment: Path) -> Path:
    found = [p for p in environment.rglob(_BINARY) if p.is_file() and p.read_bytes()[:4] == b"\x7fELF"]
    if not found or not (found[0].parent / "libllama.so.0").exists():
        raise Missing(f"no whole {_BINARY} in {environment}; remove that folder and run make bench-peers")
    return found[0]
