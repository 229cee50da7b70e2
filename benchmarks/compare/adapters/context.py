"""What every adapter needs: where things lie, how large the load is, and the words to fill in."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare.install import python_of, stamp_of
from benchmarks.compare.process import free_port
from benchmarks.compare.settings import PEERS, Entry
from benchmarks.compare.weights import location


class Missing(Exception):
    """The engine is not on this machine; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """`max_seqs` and `max_len` cover the largest load of the run; every engine gets the same KV memory."""

    peers_dir: Path
    weights_dir: Path
    num_threads: int
    max_seqs: int
    max_len: int
    kv_gib: int = 2
    xllm_flags: tuple[str, ...] = ()

    def weights(self, entry: Entry, *, gguf: bool) -> Path:
        return location(self.weights_dir, entry.weights, gguf=gguf)

    def words(self, port: int, weights: Path) -> dict[str, str]:
        """The replacements of `settings.Entry`."""
        values = {
            "port": port,
            "weights": weights,
            "threads": self.num_threads,
            "max_seqs": self.max_seqs,
            "max_len": self.max_len,
            "context": self.max_seqs * self.max_len,
            "kv_gib": self.kv_gib,
            "kv_bytes": self.kv_gib << 30,
        }
        return {name: str(value) for name, value in values.items()}

    def port(self) -> int:
        return free_port()


def fill(templates: tuple[str, ...], words: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(template.format_map(words) for template in templates)


def installed(context: Context, peer: str) -> Path:
    """The peer's interpreter. Raises Missing when its installation was not completed."""
    if not stamp_of(context.peers_dir, peer).exists():
        raise Missing(f"not in {context.peers_dir}; run make bench-peers ({PEERS[peer].requirement})")
    return python_of(context.peers_dir, peer).absolute()


def output_of(command: list[str]) -> str:
    """First line of what a short command prints, for versions; empty when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return (done.stdout or done.stderr).strip().partition("\n")[0]
