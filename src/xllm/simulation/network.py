"""The wires between simulated engines: time that bytes take, and what goes wrong on them.

A node is one process's end of the data plane. Its links have a latency and a bandwidth that all its transfers
share; a fault belongs to the next transfer that begins. Which pages move is `transfers.py`'s matter.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from xllm.engine.platform.null_runner import TokenPages
from xllm.simulation.link import Pipe

LinkFaultKind = Literal["cut", "stall", "stall_answers", "corrupt", "slow", "repeat", "call"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFault:
    """Of one transfer, once `fraction` of what was offered has been copied; 1 = behind the last byte.

    cut: the connection breaks. stall: nothing passes for `lasts_s`, and nobody is told; stall_answers: only
    the receiver's words are held. corrupt: one token of the next page changes on its way. slow: bytes take
    `factor` times as long. repeat: the next messages arrive twice. call: `call(sender, receiver)` does what
    it likes at this moment.
    """

    kind: LinkFaultKind
    fraction: float = 0.0
    lasts_s: float = 3.0
    factor: float = 1000.0
    call: Callable[[str, str], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """`one_sided`: a sender writes into leased pages itself, whatever the receiver does meanwhile (shared
    memory, RDMA); else the receiver copies what arrives, and looks at the lease first (tcp)."""

    latency_s: float = 0.0002
    bytes_per_s: float = 1e9
    one_sided: bool = True


@dataclass(slots=True)
class Lane:
    """What one process can send, or receive, at a time: later copies wait for earlier ones."""

    free_s: float = 0.0


@dataclass(slots=True, eq=False)
class Route:
    """One connection of one transfer. Whatever enters a pipe before `held_until_s` stays there until then."""

    caller: str
    answerer: str
    to_answerer: Pipe
    to_caller: Pipe
    held_until_s: dict[Pipe, float] = field(default_factory=dict)

    def cut(self) -> None:
        self.to_answerer.cut()
        self.to_caller.cut()

    def hold(self, pipe: Pipe, until_s: float) -> None:
        self.held_until_s[pipe] = max(until_s, self.held_until_s.get(pipe, 0.0))


class Network:
    """All nodes of one simulation. `partitioned` pairs exchange nothing until they are joined again."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._loop = asyncio.get_running_loop()
        self._accept: dict[str, Callable[[Route], None]] = {}
        self._memory: dict[str, list[TokenPages]] = {}
        self._lanes: dict[str, tuple[Lane, Lane]] = {}
        self._planned: deque[LinkFault] = deque()
        self._parted_until_s: dict[frozenset[str], float] = {}
        self.num_faults_hit = 0
        self.num_bytes = 0

    def listen(self, endpoint: str, accept: Callable[[Route], None], memory: list[TokenPages]) -> None:
        """`memory` by KV group is what one-sided peers write into; it outlives a process that was killed."""
        self._accept[endpoint] = accept
        self._memory[endpoint] = memory
        self._lanes[endpoint] = (Lane(), Lane())

    def gone(self, endpoint: str) -> None:
        """The process is: nobody can connect any more."""
        self._accept.pop(endpoint, None)

    def connect(self, caller: str, endpoint: str) -> Route | None:
        """A new connection, or None where nobody listens."""
        accept = self._accept.get(endpoint)
        if accept is None:
            return None

        def latency_of(pipe: Callable[[], Pipe]) -> Callable[[], float]:
            return lambda: self._latency_s(route, pipe(), caller, endpoint)

        route = Route(
            caller,
            endpoint,
            Pipe(self._loop, latency_of(lambda: route.to_answerer)),
            Pipe(self._loop, latency_of(lambda: route.to_caller)),
        )
        accept(route)
        return route

    # -- faults -----------------------------------------------------------------------------------

    def plan(self, fault: LinkFault) -> None:
        """The next transfer that anybody begins, and that has none yet, suffers it."""
        self._planned.append(fault)

    def next_fault(self) -> LinkFault | None:
        return self._planned.popleft() if self._planned else None

    def part(self, one: str, other: str, lasts_s: float) -> None:
        """Nothing passes between the two for so long; connections stay."""
        self._parted_until_s[frozenset((one, other))] = self._loop.time() + lasts_s

    # -- time ---------------------------------------------------------------------------------------

    async def pass_bytes(self, sender: str, receiver: str, num_bytes: int, factor: float) -> None:
        """Take the time that a copy needs, behind the copies that share one of the two lanes."""
        now_s = self._loop.time()
        out, into = self._lanes[sender][0], self._lanes[receiver][1]
        begin_s = max(now_s, out.free_s, into.free_s, self.parted_until_s(sender, receiver))
        end_s = begin_s + factor * num_bytes / self.wire.bytes_per_s
        # A slow connection is slow by itself; it does not keep others from the lanes.
        out.free_s = into.free_s = begin_s + num_bytes / self.wire.bytes_per_s
        self.num_bytes += num_bytes
        await asyncio.sleep(end_s - now_s)

    def write(self, receiver: str, group: int, slot: int, content: bytes) -> None:
        """What one-sided senders do. Nobody at the receiver looks, so a wrong slot is a wrong page."""
        self._memory[receiver][group][slot] = np.frombuffer(content, dtype=np.int32)

    def parted_until_s(self, one: str, other: str) -> float:
        return self._parted_until_s.get(frozenset((one, other)), 0.0)

    def _latency_s(self, route: Route, pipe: Pipe, caller: str, endpoint: str) -> float:
        held_s = max(route.held_until_s.get(pipe, 0.0), self.parted_until_s(caller, endpoint))
        return max(0.0, held_s - self._loop.time()) + self.wire.latency_s
