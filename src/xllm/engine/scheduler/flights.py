"""Plans that were handed over and are not absorbed yet: whose rows they hold, and the pages they may touch.

Pages of a sequence that ends or is preempted while its rows are under way belong to nobody and are still
given to nobody, until the last plan that names them has been absorbed. No policy here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from xllm.engine.memory.manager import PageTable
from xllm.engine.plan import StepPlan
from xllm.engine.request import Sequence
from xllm.errors import InternalError


@dataclass(slots=True)
class Flight:
    """`sequences` are those that still wait for its result; who has ended or was preempted left it."""

    plan: StepPlan
    sequences: dict[int, Sequence]
    planned_s: float
    is_ahead: bool
    """Another plan was under way when it was made."""
    tables: list[PageTable] = field(default_factory=list)
    """To be released once it is absorbed."""


class Flights:
    """In the order of submission, which is the order in which they run. Writes `Sequence.in_flight` and
    `Sequence.drawing`, nobody else does."""

    def __init__(self, release: Callable[[PageTable], None]) -> None:
        self._release = release
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights)

    def begin(self, plan: StepPlan, sequences: dict[int, Sequence], now_s: float) -> None:
        for entry in plan.sequences:
            seq = sequences[entry.seq_id]
            seq.in_flight += len(entry.tokens)
            seq.drawing += entry.sample is not None
        self._flights.append(Flight(plan, sequences, now_s, is_ahead=len(self._flights) > 0))

    def end(self, plan: StepPlan) -> Flight:
        """The oldest one, which must be `plan`: it has run, or was dropped. Its tables are given back."""
        if not self._flights or self._flights[0].plan is not plan:
            raise InternalError("a step was absorbed out of order")
        flight = self._flights.popleft()
        for entry in plan.sequences:
            seq = flight.sequences.get(entry.seq_id)
            if seq is not None:
                seq.in_flight -= len(entry.tokens)
                seq.drawing -= entry.sample is not None
        for table in flight.tables:
            self._release(table)
        return flight

    def leave(self, seq: Sequence) -> None:
        """Its rows under way are in vain, and its pages are given back as soon as nothing can touch them."""
        last: Flight | None = None
        if seq.in_flight:
            for flight in self._flights:
                if flight.sequences.pop(seq.seq_id, None) is not None:
                    last = flight
            seq.in_flight = seq.drawing = 0
        table, seq.table = seq.table, None
        if table is None:
            return
        if last is None:
            self._release(table)
        else:
            last.tables.append(table)
