"""How much memory a server leaves to its engines: read once, before any of them has taken its part.

Engines that start together would each see what the others have not taken yet; so they are told.
"""

from __future__ import annotations

from xllm.config.load import Loaded
from xllm.engine.platform.room import measure_room

FRONT_BYTES = 160 << 20
"""HTTP, tokenizer and journals of a front; seen 70 MiB idle with a vocabulary of 49,152."""


def with_room(loaded: Loaded) -> tuple[Loaded, str]:
    """(the settings with `memory_bytes`, a line that says why); what was asked for stays."""
    asked = loaded.values.get("memory_bytes")
    if asked is not None:
        return loaded, f"memory_bytes = {asked}: as asked"
    room = measure_room()
    left = max(0, room.num_bytes - FRONT_BYTES)
    why = f"memory for the engines: {left >> 20} MiB; {room.why}, {FRONT_BYTES >> 20} MiB are for the front"
    return loaded.override(memory_bytes=left), why
