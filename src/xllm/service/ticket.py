"""What the front keeps per live request: where it is, where it has been, and its share of the load.

Bookkeeping only: where it goes is `placer`'s and `dispatch`'s decision, its output the journal's.
"""

from __future__ import annotations

from xllm.service.instances.instance import Instance
from xllm.service.journal import RequestJournal
from xllm.service.live import LiveRequest


class Ticket:
    """`instance` None = it waits. `enter` and `leave` keep that, the instance's set and its load in step."""

    __slots__ = (
        "age", "answered", "avoid", "failed_targets", "first_s", "gap_from_s", "instance", "last_name",
        "last_s", "live", "model_id", "moved_cause", "moved_from", "nonexact", "num_handovers",
        "num_moves", "num_refusals", "numerics_class", "offer", "refused_by", "stays", "_backlog", "_context",
    )  # fmt: skip

    def __init__(self, live: LiveRequest, model_id: str, age: int) -> None:
        self.live = live
        self.model_id = model_id
        self.age = age
        self.instance: Instance | None = None
        self.last_name = ""
        self.numerics_class = ""
        self.avoid: Instance | None = None
        """Where it was last; a restarted instance of the same name is another object, hence welcome."""
        self.refused_by: set[str] = set()
        self.answered = False
        """The present attempt has committed something."""
        self.first_s: float | None = None
        self.last_s = live.submitted_s
        self.gap_from_s: float | None = None
        """Since when the client has waited for a move's first answer."""
        self.moved_from: Instance | None = None
        self.moved_cause = ""
        self.num_moves = 0
        self.num_handovers = 0
        """Moves that took its pages along: no token was computed again, and none of them counts as a loss."""
        self.offer: tuple[Instance, str] | None = None
        """While it waits: where its pages may be, and the name of the transfer that brought them."""
        self.num_refusals = 0
        self.failed_targets: list[str] = []
        """Where its present instance could not move it, in that order."""
        self.stays = False
        """No move off its present instance pays."""
        self.nonexact = False
        self._backlog = 0
        self._context = 0

    @property
    def journal(self) -> RequestJournal:
        return self.live.journal

    @property
    def has_begun(self) -> bool:
        """It was accepted somewhere before: a refusal is the instance's affair, not its client's."""
        return self.num_moves + self.num_handovers > 0

    @property
    def num_tokens(self) -> int:
        """Rows that an engine must have computed before it draws the next token."""
        return self.journal.num_prompt_tokens + self.journal.num_committed

    def enter(self, instance: Instance, num_matched: int) -> None:
        """`num_matched` of its tokens are in pages there already."""
        self.instance = instance
        self.last_name = instance.name
        self.answered = self.stays = False
        self.failed_targets.clear()
        self._backlog = max(1, self.num_tokens - num_matched)
        instance.backlog_tokens += self._backlog
        instance.enter(self.live.request_id)

    def answer(self) -> None:
        """The attempt's first output is committed: its rows are computed and are context from now on."""
        self.answered = True
        self.num_refusals = 0
        self.refused_by.clear()
        if self.instance is not None:
            self.instance.backlog_tokens -= self._backlog
            self._backlog = 0
            self.grow(self.num_tokens)

    def grow(self, num_tokens: int) -> None:
        if self.instance is not None:
            self._context += num_tokens
            self.instance.context_tokens += num_tokens

    def leave(self) -> Instance | None:
        """Off its instance, which is returned."""
        instance, self.instance = self.instance, None
        if instance is not None:
            instance.backlog_tokens -= self._backlog
            instance.context_tokens -= self._context
            self._backlog = self._context = 0
            instance.leave(self.live.request_id, len(self.journal.choices))
        return instance
