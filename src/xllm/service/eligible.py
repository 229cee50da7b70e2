"""Which of a model's instances a request may be offered to. Order and choice among them are the router's."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.service.instances.instance import Instance
from xllm.service.ticket import Ticket
from xllm.types import RequestSpec


def preferred(ticket: Ticket, candidates: Sequence[Instance]) -> Sequence[Instance]:
    """Those that continue bit for bit, if any; of these, those that it does not come from, if any."""
    pool = large_enough(ticket.journal.spec, candidates)
    if ticket.journal.num_committed > 0:
        pool = [i for i in pool if i.card.numerics_class == ticket.numerics_class] or pool
    fresh = [i for i in pool if i.name not in ticket.refused_by and i is not ticket.avoid]
    return fresh or [i for i in pool if i is not ticket.avoid] or pool


def large_enough(spec: RequestSpec, candidates: Sequence[Instance]) -> Sequence[Instance]:
    """Instances of one model may be set to different lengths. If none fits, one of them will say so."""
    need = len(spec.prompt_token_ids) + (spec.params.max_tokens or 1)
    return [i for i in candidates if need <= i.card.max_model_len] or candidates
