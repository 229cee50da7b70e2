"""The front's books: what was accepted and refused, and how every request ended. Counts, no decisions."""

from __future__ import annotations

from collections import Counter

from xllm.service.snapshot import RequestRecord
from xllm.service.ticket import Ticket


class Tally:
    """`ended` is called once for each request that was accepted, so the sums agree at idle."""

    def __init__(self) -> None:
        self.num_accepted = 0
        self.num_refused = 0
        self.num_ended: Counter[str] = Counter()
        self.num_divergences = 0
        self.num_stale_frames = 0

    def ended(self, ticket: Ticket, now_s: float) -> RequestRecord:
        """Enter an ended request."""
        live, journal = ticket.live, ticket.journal
        self.num_divergences += journal.num_divergences
        self.num_stale_frames += journal.num_stale_frames
        outcome = live.error.code if live.error is not None else str(journal.choices[0].finish_reason)
        self.num_ended[outcome] += 1
        return RequestRecord(
            request_id=live.request_id,
            model=ticket.model_id,
            instance=ticket.last_name,
            outcome=outcome,
            finish_reasons=tuple(c.finish_reason for c in journal.choices),
            usage=journal.usage(),
            e2e_s=now_s - live.submitted_s,
            ttft_s=None if ticket.first_s is None else ticket.first_s - live.submitted_s,
            queue_s=journal.queue_ms / 1000,
            prefill_ms=journal.prefill_ms,
            num_attempts=journal.attempt + 1,
            num_moves=ticket.num_moves,
            num_handovers=ticket.num_handovers,
            num_preemptions=journal.num_preemptions,
            nonexact=ticket.nonexact,
        )
