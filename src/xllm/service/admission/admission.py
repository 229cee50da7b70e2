"""The decision and the books it stands on; pure. Why so: docs/design/0013-admission.md."""

from __future__ import annotations

import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from xllm.config import FrontConfig
from xllm.errors import CapacityError
from xllm.service.admission.lengths import OutputLengths
from xllm.service.admission.tenants import Shares
from xllm.service.admission.waits import InstanceQueue
from xllm.service.router.base import InstanceView
from xllm.types import PAGE_SIZE, EngineSnapshot, RequestClass, RequestSpec

RETRY_AFTER_S = 1.0
"""Told to refused clients while the time that the queue needs is not known; also the least."""
MAX_RETRY_AFTER_S = 60.0
MAX_JITTER = 0.5
"""Clients refused in the same second shall not come back in the same second."""
MAX_QUEUES = 1024
GONE = 0.1
"""A predicted wait below this part of max_queue_delay_s is no queue."""
STANDING = 0.4
"""Part of max_queue_delay_s that counts once a queue has stood for longer than that: a burst deserves the
whole; a queue that stays makes everybody wait and nothing faster, and must be gone soon afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What admission needs to know of a request."""

    request_id: str
    model: str
    num_prompt_tokens: int
    max_tokens: int
    num_choices: int = 1
    tenant: str = ""
    cls: RequestClass = "online"
    deadline_ms: float | None = None

    @classmethod
    def of(cls, spec: RequestSpec) -> Ask:
        return cls(
            request_id=spec.request_id,
            model=spec.model,
            num_prompt_tokens=len(spec.prompt_token_ids),
            max_tokens=spec.params.max_tokens or 1,
            num_choices=spec.params.n,
            tenant=spec.tenant,
            cls=spec.cls,
            deadline_ms=spec.deadline_ms,
        )


@dataclass(slots=True)
class _Held:
    """An admitted request. `instance` is where it waits for its first token; None = it does not."""

    ask: Ask
    pages: int
    instance: str | None = None
    answered: bool = False


class Admission:
    """Every `admit` that returned is matched by exactly one `ended`; the counts are zero at idle.

    `num_refused` counts refusals by rule (the keys of `_RULES`).
    """

    def __init__(self, config: FrontConfig) -> None:
        self._config = config
        self._held: dict[str, _Held] = {}
        self._pages: dict[str, int] = {}
        self._lengths = OutputLengths()
        self._shares = Shares()
        self._queues: OrderedDict[str, InstanceQueue] = OrderedDict()
        self._queueing_since_s: dict[str, float] = {}
        self.num_tokens = 0
        self.num_refused: Counter[str] = Counter()

    @property
    def num_reqs(self) -> int:
        return len(self._held)

    def num_pages(self, model: str) -> int:
        """Predicted KV pages of the model's admitted requests."""
        return self._pages.get(model, 0)

    def admit(self, ask: Ask, views: Sequence[InstanceView], now_s: float) -> None:
        """Count the request in, or raise CapacityError and count nothing. `views` may serve it."""
        for view in views:
            self._queue(view.name).note(view.engine, 0, now_s)
        pages = self._predicted_pages(ask)
        rule = self._refusal(ask, pages, views, now_s)
        if rule is not None:
            raise self.refused(rule, ask, views, now_s)
        self._held[ask.request_id] = _Held(ask, pages)
        self._pages[ask.model] = self._pages.get(ask.model, 0) + pages
        self._shares.hold(ask.tenant, pages)
        self.num_tokens += ask.num_prompt_tokens

    def placed(self, request_id: str, instance: str) -> None:
        """The request waits at `instance` now; also after a move, unless it had answered before."""
        held = self._held[request_id]
        if not held.answered:
            self._leave_queue(held)
            held.instance = instance
            self._queue(instance).num_unanswered += 1

    def answered(self, request_id: str, engine: EngineSnapshot, now_s: float) -> None:
        """Its first token came; `engine` is the instance's state after the step that made it."""
        held = self._held[request_id]
        if held.instance is not None:
            self._queue(held.instance).note(engine, 1, now_s)
        self._leave_queue(held)
        held.answered = True

    def ended(self, request_id: str, output_lens: Sequence[int], *, complete: bool) -> None:
        """The request is over; `complete` = its answers ended by themselves."""
        held = self._held.pop(request_id)
        self._leave_queue(held)
        ask = held.ask
        self._pages[ask.model] -= held.pages
        if not self._pages[ask.model]:
            del self._pages[ask.model]
        self._shares.release(ask.tenant, held.pages)
        self.num_tokens -= ask.num_prompt_tokens
        if complete:
            for num_tokens in output_lens:
                self._lengths.observe(ask.model, ask.tenant, num_tokens)

    def wait_s(self, views: Sequence[InstanceView], now_s: float) -> float:
        """Predicted wait for a first token at the instance where it is least."""
        return min((self._queue(v.name).wait_s(v, now_s) for v in views), default=0.0)

    def refused(self, rule: str, ask: Ask, views: Sequence[InstanceView], now_s: float) -> CapacityError:
        """The answer to a request that is refused by a rule, entered in the books."""
        self.num_refused[rule] += 1
        self._shares.refuse(ask.tenant, now_s)
        code, message = _RULES[rule]
        # When the present queue should be gone. The id is random, so it spreads clients over time as well
        # as any dice would, and the same run gives the same answers.
        drain_s = min(max(self.wait_s(views, now_s), RETRY_AFTER_S), MAX_RETRY_AFTER_S)
        spread = zlib.crc32(ask.request_id.encode()) / 2**32
        return CapacityError(message, code=code, retry_after_s=drain_s * (1 + MAX_JITTER * spread))

    # -- inside -------------------------------------------------------------------------------

    def _refusal(self, ask: Ask, pages: int, views: Sequence[InstanceView], now_s: float) -> str | None:
        """The first rule that speaks against it."""
        config = self._config
        factor = self._shares.factor(ask.tenant, now_s)
        if self.num_reqs >= config.max_num_inflight_reqs * factor:
            return "requests"
        # What is larger than a limit by itself is let in alone: "try again later" would be a lie.
        if self._held and self.num_tokens + ask.num_prompt_tokens > config.max_num_inflight_tokens * factor:
            return "tokens"
        # Engines that do not tell their pages set no limit.
        most = sum(v.engine.total_pages for v in views) * config.max_kv_oversubscription * factor
        if most and self.num_pages(ask.model) and self.num_pages(ask.model) + pages > most:
            return "pages"
        wait_s = self.wait_s(views, now_s)
        if ask.deadline_ms is not None and wait_s * 1000 > ask.deadline_ms:
            return "deadline"
        limit_s = self._delay_limit_s(ask.model, wait_s, now_s)
        if limit_s and ask.cls == "online" and wait_s > limit_s * factor:
            return "delay"
        return None

    def _delay_limit_s(self, model: str, wait_s: float, now_s: float) -> float:
        limit_s = self._config.max_queue_delay_s
        if wait_s <= limit_s * GONE:
            self._queueing_since_s.pop(model, None)
            return limit_s
        stood_s = now_s - self._queueing_since_s.setdefault(model, now_s)
        return limit_s * STANDING if stood_s > limit_s else limit_s

    def _predicted_pages(self, ask: Ask) -> int:
        out = self._lengths.predict(ask.model, ask.tenant, ask.max_tokens)
        return -(-ask.num_prompt_tokens // PAGE_SIZE) + ask.num_choices * -(-out // PAGE_SIZE)

    def _leave_queue(self, held: _Held) -> None:
        if held.instance is not None:
            self._queue(held.instance).num_unanswered -= 1
            held.instance = None

    def _queue(self, instance: str) -> InstanceQueue:
        queue = self._queues.get(instance)
        if queue is None:
            # A quarter of the delay that matters: quicker would be noise, slower would be late.
            queue = self._queues[instance] = InstanceQueue((self._config.max_queue_delay_s or 4.0) / 4)
            self._drop_idle_queues()
        return queue

    def _drop_idle_queues(self) -> None:
        """Instances come and go under new names; those nobody waits at are forgotten, oldest first."""
        for name in tuple(self._queues)[: max(0, len(self._queues) - MAX_QUEUES)]:
            if self._queues[name].num_unanswered == 0:
                del self._queues[name]


_FULL = "the server is at capacity; try again later"
_RULES: dict[str, tuple[str, str]] = {
    "requests": ("queue_full", _FULL),
    "tokens": ("queue_full", _FULL),
    "pages": ("queue_full", _FULL),
    "instances": ("queue_full", "all instances of this model are full; try again later"),
    "deadline": ("slow_down", "the wait is longer than the request's own time limit; try again later"),
    "delay": ("slow_down", "the wait for a first token would be too long now; slow down"),
}
"""Rule → the error's code and message. `instances` is the router's: no instance has room."""
