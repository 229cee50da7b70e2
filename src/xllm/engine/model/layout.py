"""KV groups of a model: layers that keep the same positions share a group."""

from __future__ import annotations

from xllm.arch import ArchConfig
from xllm.types import KVGroup, KVLayout

ORDER = "page,kv,layer,head,token,dim"
"""How the reference keeps a page; a backend with another order names it, as pages may cross instances."""


def kv_layout(arch: ArchConfig, dtype: str, order: str = ORDER) -> KVLayout:
    """One group per distinct window, in order of first appearance. A window as long as the context
    is still a window: it frees nothing, but the layers keep their group."""
    groups = []
    for window in dict.fromkeys(arch.layer_windows):
        layers = tuple(i for i, w in enumerate(arch.layer_windows) if w == window)
        groups.append(
            KVGroup(
                kind="full" if window is None else "window",
                layers=layers,
                num_kv_heads=arch.num_kv_heads,
                head_dim=arch.head_dim,
                window=window,
            )
        )
    return KVLayout(groups=tuple(groups), dtype=dtype, order=order)


def layer_places(layout: KVLayout) -> tuple[tuple[int, int], ...]:
    """For each layer of the model: (group, index within the group)."""
    places = {layer: (g, i) for g, group in enumerate(layout.groups) for i, layer in enumerate(group.layers)}
    return tuple(places[layer] for layer in range(len(places)))
