"""How the garbage collector behaves in a process that serves: what was loaded is never walked again.

Only the composers of a process of ours call it (engine process, `serve`), never a library: the collector
belongs to the whole interpreter.
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 20_000
"""New container objects between two young collections; a few steps reach the default of 700."""


def settle() -> None:
    """To be called once loading is over.

    What a token needs dies by its reference count; cycles come from requests (tasks, exceptions) and from
    failures, so the collector stays on. Frozen objects are left out of the full collections, which would
    otherwise stop every stream for as long as it takes to walk a tokenizer and all imported code.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
