"""Watches instances and acts on what is found: suspects, losses, drains. The front's only timer.

The judgement stands in `failover`; here it meets the clock, the connections and the causes of death.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Coroutine, Sequence

from xllm.clock import Clock
from xllm.config import FrontConfig
from xllm.service.catalogue import Catalogue
from xllm.service.dispatch import Dispatch
from xllm.service.failover.blame import DeathCause, known_cause
from xllm.service.failover.detector import Detector, DetectorLimits, Finding
from xllm.service.handover.relocation import Relocation
from xllm.service.instances.instance import Instance
from xllm.service.placer import Placer
from xllm.service.snapshot import FrontObserver
from xllm.wire.messages import KvDelta, KvSync, Pulse

log = logging.getLogger(__name__)

TICK_S = 0.2

CAUSE_TIMEOUT_S = 0.5
"""The cause of a death decides about blame, and requests wait for it."""


class Guard:
    """Every instance that was `watch`ed is told of once as lost, unless it was `release`d before."""

    def __init__(
        self,
        config: FrontConfig,
        clock: Clock,
        catalogue: Catalogue,
        observer: FrontObserver,
    ) -> None:
        self.num_deaths: Counter[str] = Counter()
        self.num_suspicions = 0
        self.num_kv_gaps = 0
        self._clock = clock
        self._catalogue = catalogue
        self._observer = observer
        self._grace_s = config.recovery_grace_s
        self._drain_s = config.shutdown_timeout_s / 2
        limits = DetectorLimits(
            floor_s=config.suspect_floor_s, factor=config.suspect_factor, kill_s=config.hang_kill_s
        )
        self._detector = Detector(limits, TICK_S)
        self._dispatch: Dispatch | None = None
        self._placer: Placer | None = None
        self._relocation: Relocation | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def connect(self, dispatch: Dispatch, placer: Placer, relocation: Relocation) -> None:
        """Once, before the first instance: whom to take requests off with, whom to tell of pages, and who
        moves requests while they run."""
        self._dispatch, self._placer, self._relocation = dispatch, placer, relocation

    # -- coming and going ---------------------------------------------------------------------------

    def watch(self, instance: Instance) -> None:
        """From the moment it may get requests."""
        self._detector.add(instance.name, self._clock.monotonic_s(), pulses=instance.about.pulses)
        if instance.kv_asked:
            self._ask_pages(instance)
        self._tell(instance, "added")
        self._arm()
        self._moves.pump()

    def lost(self, instance: Instance) -> None:
        """Its connection has ended unasked."""
        if not instance.started:
            return  # `Catalogue.add` reports it; it has never had a request
        now_s = self._clock.monotonic_s()
        quiet_s = self._detector.quiet_s(instance.name, now_s)
        self._unlist(instance)
        log.error("instance %s is lost with %d requests", instance.name, len(instance.requests))
        if instance.draining:
            self._catalogue.lost(instance, forget_s=now_s + self._grace_s)
            self._moves.evict(instance, "drain")
            self._tell(instance, "drained", quiet_s)
        else:
            self._catalogue.lost(instance, forget_s=None)
            request_ids = self._moves.evict(instance, "lost", hold=True)
            self._find_cause(instance, request_ids, quiet_s)
        self._spawn(instance.close())

    async def release(self, instance: Instance) -> None:
        """Take it out of service at once; its requests go elsewhere."""
        self._unlist(instance)
        instance.draining = True
        self._moves.evict(instance, "removed")
        await instance.close()
        self._catalogue.lost(instance, forget_s=self._clock.monotonic_s() + self._grace_s)
        self._tell(instance, "removed")

    async def drain(self, instance: Instance, grace_s: float) -> None:
        """No new requests; those it has are moved while they run where that is cheaper than computing them
        again; what has not ended after `grace_s` goes elsewhere. Returns when it has none."""
        self.begin_drain(instance, grace_s)
        if grace_s <= 0:
            self._moves.evict(instance, "drain")
        await instance.idle.wait()

    def begin_drain(self, instance: Instance, grace_s: float | None = None) -> None:
        """As `drain`, in the background. None = half of the time that a shutdown may take."""
        due_s = self._clock.monotonic_s() + (self._drain_s if grace_s is None else grace_s)
        instance.drain_due_s = due_s if instance.drain_due_s is None else min(due_s, instance.drain_due_s)
        if not instance.draining:
            instance.draining = True
            self._moves.deserted(instance)
            self._tell(instance, "drain")
            if self._relocation is not None:
                self._relocation.off(instance)
        self._arm()

    # -- signs of life --------------------------------------------------------------------------------

    def progress(self, instance: Instance) -> None:
        self._detector.progress(instance.name, self._clock.monotonic_s())
        if instance.snapshot.draining and not instance.draining:
            self.begin_drain(instance)

    def heard(self, instance: Instance) -> None:
        self._detector.heard(instance.name, self._clock.monotonic_s())
        if instance.snapshot.draining and not instance.draining:
            self.begin_drain(instance)

    def pulse(self, instance: Instance, pulse: Pulse) -> None:
        self._detector.pulse(instance.name, self._clock.monotonic_s(), pulse)

    def pages(self, instance: Instance, delta: KvDelta) -> None:
        """After a gap a reset is asked for once; until it comes the index keeps what it had as a hint."""
        if not instance.started or self._placer is None:
            instance.kv_asked = True  # `watch` does it: until then another may still hold the name
        elif self._placer.learn(instance, delta):
            instance.kv_asked = False
        elif not instance.kv_asked:
            self.num_kv_gaps += 1
            self._ask_pages(instance)

    def quiet_s(self, instance: Instance) -> float:
        """Since its last sign of progress."""
        return self._detector.quiet_s(instance.name, self._clock.monotonic_s())

    def tick(self) -> None:
        """Look at everything that depends on time. The timer calls it; tests with a fake clock do so, too."""
        now_s = self._clock.monotonic_s()
        for finding in self._detector.tick(now_s):
            instance = self._catalogue.get(finding.name)
            if instance is not None:
                self._act(instance, finding)
        for instance in self._catalogue.instances():
            due_s = instance.drain_due_s
            if instance.requests and due_s is not None and now_s >= due_s:
                self._moves.evict(instance, "drain")
        self._moves.pump()
        self._moves.expire()
        if self._relocation is not None:
            self._relocation.tick()
        self._catalogue.expire(now_s)

    async def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tasks = tuple(self._tasks)
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- inside ---------------------------------------------------------------------------------------

    @property
    def _moves(self) -> Dispatch:
        if self._dispatch is None:
            raise RuntimeError("a guard is connected before it is used")
        return self._dispatch

    def _ask_pages(self, instance: Instance) -> None:
        instance.kv_asked = True
        instance.post(KvSync())

    def _unlist(self, instance: Instance) -> None:
        """What is known of it must not be taken for knowledge of a later one of that name."""
        self._detector.remove(instance.name)
        if self._placer is not None:
            self._placer.forget(instance.name)

    def _act(self, instance: Instance, finding: Finding) -> None:
        if finding.kind == "ready":
            instance.suspect = False
            self._moves.acquit(instance)
            log.warning("instance %s is back after a suspicion", instance.name)
            self._tell(instance, finding.reason, finding.quiet_s)
        elif finding.kind == "suspect":
            instance.suspect = True
            self.num_suspicions += 1
            log.error(
                "instance %s is suspected: %s for %.1f s, with %d requests",
                instance.name,
                finding.reason,
                finding.quiet_s,
                len(instance.requests),
            )
            self._tell(instance, finding.reason, finding.quiet_s)
            held = self._moves.evict(instance, "suspect", hold=True)
            # Its I/O thread lives and says that the step stands still: that is a hang before anybody is
            # killed for it. Silence may be the network's.
            self._find_cause(instance, held, None, "hang" if finding.reason == "stuck" else "unknown")
        elif instance.on_hung is not None:
            log.error("instance %s stays suspect; its owner is told", instance.name)
            instance.on_hung()
        else:
            log.error("instance %s stays suspect; closing its connection", instance.name)
            instance.abandon()

    def _find_cause(
        self,
        instance: Instance,
        request_ids: Sequence[str],
        death_after_s: float | None,
        otherwise: DeathCause = "unknown",
    ) -> None:
        """Ask why, then let the requests go on; they do so whatever the answer.

        `death_after_s`: it is dead, so long after its last progress; None = only suspected. `otherwise` is
        what to take it for where nobody knows better.
        """
        answer: str | Awaitable[str] = "unknown"
        if instance.cause_of is not None:
            try:
                answer = instance.cause_of()
            except Exception:
                log.exception("instance %s: the cause of its failure cannot be told", instance.name)
        if isinstance(answer, str):
            self._verdict(instance, request_ids, _known_or(answer, otherwise), death_after_s)
        else:
            self._spawn(self._await_cause(instance, request_ids, answer, death_after_s, otherwise))

    async def _await_cause(
        self,
        instance: Instance,
        request_ids: Sequence[str],
        answer: Awaitable[str],
        death_after_s: float | None,
        otherwise: DeathCause,
    ) -> None:
        cause = "unknown"
        try:
            cause = await asyncio.wait_for(answer, CAUSE_TIMEOUT_S)
        except Exception:
            log.exception("instance %s: the cause of its failure cannot be told", instance.name)
        self._verdict(instance, request_ids, _known_or(cause, otherwise), death_after_s)

    def _verdict(
        self,
        instance: Instance,
        request_ids: Sequence[str],
        cause: DeathCause,
        death_after_s: float | None,
    ) -> None:
        if death_after_s is not None:
            self.num_deaths[cause] += 1
            self._tell(instance, cause, death_after_s)
        self._moves.judge(request_ids, cause, instance)

    def _tell(self, instance: Instance, reason: str, detect_s: float = 0.0) -> None:
        self._observer.on_instance(instance.name, instance.state, reason, detect_s)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _arm(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            self.tick()
        except Exception:
            log.exception("the guard's tick failed")
        if self._catalogue.instances() or self._moves.num_waiting:
            self._arm()


def _known_or(answer: str, otherwise: DeathCause) -> DeathCause:
    cause = known_cause(answer)
    return otherwise if cause == "unknown" else cause
