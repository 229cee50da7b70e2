"""From instances to views, from views to a router's placement: the only caller of router policies.

Fills in what a policy may look at and logs what it decided. Nothing is sent from here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from xllm.config import FrontConfig
from xllm.errors import InternalError
from xllm.service.instances.instance import Instance
from xllm.service.router.base import InstanceView, Placement, RequestView, RouterPolicy, RouterSnapshot
from xllm.types import RequestSpec

decisions = logging.getLogger("xllm.decisions")


class Placer:
    """Counts turns per model; everything else a policy sees is read when it is asked."""

    def __init__(self, config: FrontConfig, policy: RouterPolicy) -> None:
        self._config = config
        self._policy = policy
        self._turns: Counter[str] = Counter()

    def choose(
        self, spec: RequestSpec, candidates: Sequence[Instance], *, num_emitted: int = 0, attempt: int = 0
    ) -> tuple[Instance, Placement] | None:
        """Where the request goes; None when no candidate has room. `candidates` are sorted, not empty."""
        view = RequestView(
            request_id=spec.request_id,
            model=spec.model,
            num_prompt_tokens=len(spec.prompt_token_ids),
            num_choices=spec.params.n,
            max_tokens=spec.params.max_tokens or 1,
            cls=spec.cls,
            priority=spec.priority,
            slo=spec.slo,
            attempt=attempt,
            num_emitted=num_emitted,
        )
        snapshot = RouterSnapshot(
            instances=tuple(self._view(i) for i in candidates), turn=self._turns[spec.model]
        )
        placement = self._policy(view, snapshot, self._config)
        if placement is None:
            return None
        self._turns[spec.model] += 1
        decisions.info(
            "place request=%s model=%s instance=%s attempt=%d reasons=%s",
            spec.request_id,
            spec.model,
            placement.instance,
            attempt,
            ",".join(placement.reasons),
        )
        chosen = next((i for i in candidates if i.name == placement.instance), None)
        if chosen is None:
            raise InternalError("the router policy chose an instance that it was not offered")
        return chosen, placement

    def _view(self, instance: Instance) -> InstanceView:
        return InstanceView(
            name=instance.name,
            num_reqs=len(instance.requests),
            max_reqs=instance.max_reqs,
            engine=instance.snapshot,
            backlog_tokens=instance.backlog_tokens,
            context_tokens=instance.context_tokens,
        )
