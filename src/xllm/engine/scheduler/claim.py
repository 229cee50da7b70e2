"""Taking over sequences whose KV another engine computed: tables over what arrived, as far as it can be used.

What a peer says is compared with what the front asked for. Whatever does not fit is computed, never guessed.
"""

from __future__ import annotations

from xllm.engine.kvtransfer.base import ChoiceState, Manifest, Slots
from xllm.engine.memory.leases import chain_keys
from xllm.engine.memory.manager import PageManager, PageTable
from xllm.engine.request import Request, Sequence
from xllm.types import PAGE_SIZE


def claim_pages(memory: PageManager, request: Request, manifest: Manifest, slots: Slots) -> int:
    """Give the request's waiting sequences tables over `slots`; how many rows that saves.

    The slots stay leased: the caller lets go of them, and what no table took is free then.
    """
    if request.wants_prompt_logprobs:
        return 0  # every row's logits are asked for
    if manifest.digests:
        _publish_prefix(memory, request, manifest, slots)
        return 0  # found by the usual match when the sequence starts
    states = {state.choice: state for state in manifest.choices}
    claimed: list[Sequence] = []
    for seq in request.sequences:
        state = states.get(seq.choice)
        if state is None or seq.table is not None:
            continue
        num_rows = _usable(seq, state)
        if num_rows == 0:
            continue
        table = memory.table_over(request.root, slots, state.pages, num_rows)
        if table is not None:
            seq.table, seq.num_computed = table, num_rows
            claimed.append(seq)
    # Asked of all before any page is given back, or the last to share one would seem its only owner.
    shared = [_writes_into_shared(memory, seq) for seq in claimed]
    for seq, writes in zip(claimed, shared, strict=True):
        if seq.table is not None:
            _settle(memory, seq, seq.table, writes)
    request.claimed = any(seq.num_computed for seq in claimed)
    return sum(seq.num_computed for seq in claimed)


def _usable(seq: Sequence, state: ChoiceState) -> int:
    """Leading rows whose KV is that of this very sequence. The last token's row is always computed: its
    logits yield the next draw."""
    most = min(state.num_computed, len(state.tokens), len(seq.tokens) - 1)
    if most <= 0 or list(state.tokens[:most]) != seq.tokens[:most]:
        return 0
    return most


def _writes_into_shared(memory: PageManager, seq: Sequence) -> bool:
    """Is the page of the next row another choice's, too? They share full pages only, whatever a peer says."""
    full, partial = divmod(seq.num_computed, PAGE_SIZE)
    return partial > 0 and seq.table is not None and memory.leases.is_shared(seq.table.pages, full)


def _settle(memory: PageManager, seq: Sequence, table: PageTable, cut: bool) -> None:
    """Do without the partial page if it is to be `cut`, and name the full ones."""
    if cut:
        full = seq.num_computed // PAGE_SIZE
        memory.cut(table, full if memory.leases.covers(table.pages, full * PAGE_SIZE) else 0)
        seq.num_computed = table.num_pages * PAGE_SIZE
    if table.num_pages == 0:
        memory.release(table)
        seq.table = None
        return
    memory.computed(table, seq.tokens, seq.num_computed)


def _publish_prefix(memory: PageManager, request: Request, manifest: Manifest, slots: Slots) -> None:
    """Name fetched pages, as far as they are pages of this prompt: the tokens decide, not the names."""
    if not memory.caching or len(manifest.choices) != 1:
        return
    keys = chain_keys(request.root, request.prompt)
    parents = [key.parent for key in keys]
    if manifest.root not in parents:
        return
    first = parents.index(manifest.root)
    here = keys[first : first + len(manifest.digests)]
    tokens = [token for key in here for token in key.tokens]
    if tuple(key.digest for key in here) != manifest.digests or tuple(tokens) != manifest.choices[0].tokens:
        return
    if all(len(group) <= len(here) for group in slots):
        memory.leases.publish(slots, here)
