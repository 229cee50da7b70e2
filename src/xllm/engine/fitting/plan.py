"""A memory plan as a value: each part with its bytes and its reason, and the table that people read.

Facts come in (`Room`, `Demand`), nothing is measured, allocated or decided here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

MIB = 1 << 20


class Part(NamedTuple):
    """`num_bytes` is an upper bound."""

    name: str
    num_bytes: int
    why: str


class Room(NamedTuple):
    """What the engines of this machine may take together, what they hold by now included."""

    num_bytes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one engine takes beside its KV pages.

    `shared` is taken once however many engines there are, `own` by each of them, `working` by each from its
    first step on. `loading` is gone by then; `loads_in_turn`: one engine at a time takes it.
    """

    shared: tuple[Part, ...]
    own: tuple[Part, ...]
    working: tuple[Part, ...]
    loading: tuple[Part, ...]
    loads_in_turn: bool
    page_bytes: int
    """Of one page in every KV group, with its header and what Python keeps of it."""
    num_needed_pages: int
    """Per group, for one sequence of full length: with less, such a request could never run."""
    num_useful_pages: int
    """Per group, for as many such sequences as may run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """`parts` are for all engines together; `starting_bytes` is the most before a first request, which is not
    the sum: pages and activations are not touched yet, but weights may be there twice."""

    room: Room
    spare_bytes: int
    num_engines: int
    parts: tuple[Part, ...]
    loading: tuple[Part, ...]
    starting_bytes: int
    num_pages: int
    page_bytes: int
    num_needed_pages: int

    @property
    def limit_bytes(self) -> int:
        return self.room.num_bytes - self.spare_bytes

    @property
    def total_bytes(self) -> int:
        return total(self.parts)

    @property
    def peak_bytes(self) -> int:
        return max(self.total_bytes, self.starting_bytes)

    @property
    def fits(self) -> bool:
        return self.num_pages >= self.num_needed_pages and self.peak_bytes <= self.limit_bytes

    def lines(self) -> list[str]:
        """The table."""
        engines = "" if self.num_engines == 1 else f" of {self.num_engines} engines"
        rows = [
            (f"allowed{engines}", self.room.num_bytes, self.room.why),
            ("left alone", self.spare_bytes, "for what nobody counted"),
            *self.parts,
            ("in all", self.total_bytes, _verdict(self.total_bytes, self.limit_bytes)),
        ]
        if self.starting_bytes > self.total_bytes:
            rows += [(f"{part.name}, at start", *part[1:]) for part in self.loading]
            rows.append(
                ("in all, at start", self.starting_bytes, _verdict(self.starting_bytes, self.limit_bytes))
            )
        width = max(len(name) for name, _, _ in rows)
        return [f"{name:<{width}} {-(-size // MIB):>8} MiB  {why}" for name, size, why in rows]


def total(parts: Iterable[Part]) -> int:
    return sum(part.num_bytes for part in parts)


def _verdict(size: int, limit: int) -> str:
    if size <= limit:
        return f"fits: {(limit - size) // MIB} MiB are not given away"
    return f"does not fit: {-(-(size - limit) // MIB)} MiB are missing"
