"""Keeps the board of roles true: switches, what is still worked off, and whether a switch proved itself.

The mechanism around the pure `board` and `control`, on the front's loop. Labels only: no request moves and
no instance is told; the router reads the board with the next placement.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from xllm.clock import Clock
from xllm.config import FrontConfig
from xllm.config.instances import ROLES
from xllm.errors import RequestError, UnavailableError
from xllm.service.catalogue import Catalogue
from xllm.service.instances.instance import Instance
from xllm.service.placer import Choice, Placer
from xllm.service.roles.board import Phases, RoleBoard, Standing, keeps_floors
from xllm.service.roles.control import ControlState, RoleLimits, tick
from xllm.service.roles.monitor import LoadMonitor
from xllm.service.roles.splits import RoleView, Switch
from xllm.service.snapshot import FrontObserver
from xllm.types import MIXED, Phase, RequestSpec

log = logging.getLogger(__name__)

PROOF_S = 10.0
"""From the first work of a new phase on an instance to its first result, at most; else its role goes back."""


@dataclass(slots=True)
class _Proof:
    """Since when an instance has had work of the phases that it must still prove itself in."""

    epoch: int
    tried_s: float


class RoleKeeper:
    """One per front. `may_act` says why this front may not change roles, "" = it may."""

    def __init__(
        self,
        config: FrontConfig,
        clock: Clock,
        catalogue: Catalogue,
        placer: Placer,
        board: RoleBoard,
        observer: FrontObserver,
        *,
        is_answered: Callable[[str], bool],
    ) -> None:
        self.monitor = LoadMonitor()
        self.why_not: Callable[[], str] = lambda: ""
        self._clock = clock
        self._catalogue = catalogue
        self._placer = placer
        self._board = board
        self._observer = observer
        self._is_answered = is_answered
        self._adaptive = config.role_control == "adaptive"
        self._period_s = config.role_period_s
        self._limits = RoleLimits(ttft_ms=config.slo_ttft_ms, tpot_ms=config.slo_tpot_ms)
        self._control: dict[str, ControlState] = {}
        self._left: dict[str, dict[Phase, set[str]]] = {}
        self._proofs: dict[str, _Proof] = {}
        self._complete: set[str] = set()
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    # -- what the front tells ---------------------------------------------------------------------------

    def joined(self, instance: Instance) -> None:
        """Before it may get requests."""
        phases = frozenset(phase for phase in instance.about.phases if phase in _KNOWN) or MIXED
        self._board.joined(instance.name, phases, self._clock.monotonic_s())
        self._left.pop(instance.name, None)
        self._proofs.pop(instance.name, None)
        self.lacking()
        self._arm()

    def arrived(self, spec: RequestSpec, choice: Choice) -> None:
        """A new request was admitted and placed."""
        num_rows = max(1, len(spec.prompt_token_ids) - choice.num_matched)
        self.monitor.arrived(choice.instance.card.model_id, num_rows)

    def spoke(self, instance: Instance, request_id: str, gap_ms: float | None, *, first: bool) -> None:
        """A request there got output: its first, or further after `gap_ms` (None = that says nothing)."""
        self._board.proven(instance.name, "prefill" if first else "decode")
        if gap_ms is not None and not first:
            self.monitor.spoke(instance.name, gap_ms)

    def lacking(self) -> str:
        """A phase that no instance of some model has had since it is known, "" = none lacks.

        Later losses do not count: whoever is left does everything, and is served by rather than turned away.
        """
        roles: dict[str, set[Phase]] = {}
        for instance in self._catalogue.instances():
            if instance.routable:
                roles.setdefault(instance.card.model_id, set()).update(
                    self._board.standing(instance.name).phases
                )
        self._complete &= {i.card.model_id for i in self._catalogue.instances()}
        self._complete |= {model_id for model_id, phases in roles.items() if phases >= MIXED}
        lacks = (MIXED - roles[model_id] for model_id in sorted(roles.keys() - self._complete))
        return next((min(phases) for phases in lacks), "")

    # -- what operators ask -----------------------------------------------------------------------------

    def set_role(self, name: str, role: str, epoch: int | None, *, pinned: bool) -> Standing:
        """Switch by hand. Raises RequestError (unknown role, `conflict`), NotFoundError, UnavailableError."""
        if role not in ROLES:
            raise RequestError(f"'role' must be one of {', '.join(ROLES)}.", param="role")
        why_not = self.why_not()
        if why_not:
            raise UnavailableError(why_not, code="not_the_leader")
        instance = self._catalogue.get(name)
        standing = self._board.standing(name)
        current = epoch is None or epoch == standing.epoch
        if instance is not None and current and not self._floors_allow(instance, ROLES[role]):
            message = (
                f"{name} cannot become {role}: too few instances of its model would be left to "
                f"{'take prompts' if 'prefill' in standing.phases - ROLES[role] else 'decode'}. "
                "Switch another one first, or use mixed."
            )
            raise RequestError(message, code="conflict", param="role")
        return self._switch(name, ROLES[role], "operator", "", epoch=epoch, pinned=pinned)

    # -- time -------------------------------------------------------------------------------------------

    def check_time(self) -> None:
        """Look at everything once a period. The timer calls it; tests with a fake clock do so, too."""
        now_s = self._clock.monotonic_s()
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._period_s
        for name, standing in self._board.standings().items():
            instance = self._catalogue.get(name)
            if instance is not None:
                self._note_drained(instance, standing)
                self._check_proof(instance, self._board.standing(name), now_s)
        self.monitor.period(now_s)
        if self._adaptive and not self.why_not():
            self._run_control(now_s)

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- inside -----------------------------------------------------------------------------------------

    def _switch(
        self,
        name: str,
        phases: Phases,
        reason: str,
        numbers: str,
        *,
        epoch: int | None = None,
        pinned: bool | None = None,
    ) -> Standing:
        before = self._board.standing(name)
        now_s = self._clock.monotonic_s()
        after = self._board.switch(name, phases, now_s, reason, epoch=epoch, pinned=pinned)
        if after.epoch == before.epoch:
            return after
        log.warning("instance %s: role %s -> %s (%s) %s", name, before.role, after.role, reason, numbers)
        self._observer.on_role(name, before.role, after.role, reason, numbers)
        self._proofs.pop(name, None)
        instance = self._catalogue.get(name)
        if instance is not None:
            left = self._left.setdefault(name, {})
            for phase in before.phases - phases:
                left[phase] = {*instance.requests, *instance.inbound}
            self._note_drained(instance, after)
        self._arm()
        return self._board.standing(name)

    def _note_drained(self, instance: Instance, standing: Standing) -> None:
        """What it had when it lost a phase is worked off when it has ended, gone or passed that phase."""
        left = self._left.get(instance.name, {})
        for phase in tuple(left):
            if phase not in standing.old_phases:
                del left[phase]
                continue
            here = {*instance.requests, *instance.inbound}
            left[phase] = {
                request_id
                for request_id in left[phase] & here
                if phase == "decode" or not self._is_answered(request_id)
            }
            if not left[phase]:
                del left[phase]
                self._board.drained(instance.name, phase)
        if not left:
            self._left.pop(instance.name, None)

    def _check_proof(self, instance: Instance, standing: Standing, now_s: float) -> None:
        """A label that sends work where none gets done must not stay."""
        name = instance.name
        if not standing.unproven or standing.former is None or not _has_new_work(instance, standing):
            self._proofs.pop(name, None)
            return
        proof = self._proofs.get(name)
        if proof is None or proof.epoch != standing.epoch:
            self._proofs[name] = _Proof(standing.epoch, now_s)
        elif now_s - proof.tried_s >= PROOF_S:
            back = standing.former
            if not self._floors_allow(instance, back):
                back = standing.former | standing.phases
            # Who brought it into this role must not do so again at once, nor for ever be kept from it.
            self._switch(name, back, "unproven", f"no result in {PROOF_S:g} s")

    def _floors_allow(self, instance: Instance, phases: Phases) -> bool:
        peers = self._catalogue.routable(instance.card.model_id)
        before = [self._board.standing(peer.name).phases for peer in peers]
        after = [phases if peer is instance else self._board.standing(peer.name).phases for peer in peers]
        return keeps_floors(before, after)

    def _run_control(self, now_s: float) -> None:
        """Of models whose group is there: while engines are still starting nothing is lost that must be made
        up for. And of those whose instances can hand over, as roles mean nothing to others."""
        self.lacking()
        here = [i for i in self._catalogue.instances() if i.routable]
        alone = {i.card.model_id for i in here if not i.about.endpoints}
        models = self._complete & {i.card.model_id for i in here} - alone
        for gone in self._control.keys() - models:
            del self._control[gone]
        for model_id in sorted(models):
            state = self._control.setdefault(model_id, ControlState())
            for switch in tick(
                self._role_views(model_id), self.monitor.demand(model_id), state, self._limits, now_s
            ):
                self._apply(switch)

    def _apply(self, switch: Switch) -> None:
        self._switch(switch.instance, switch.phases, switch.reason, switch.numbers, epoch=switch.epoch)

    def _role_views(self, model_id: str) -> tuple[RoleView, ...]:
        views = []
        for load in self._placer.views(self._catalogue.routable(model_id)):
            standing = self._board.standing(load.name)
            views.append(
                RoleView(
                    load=load,
                    epoch=standing.epoch,
                    pinned=standing.pinned,
                    since_s=standing.since_s,
                    is_first_role=standing.reason == "started",
                    tpot_ms=self.monitor.tpot_ms(load.name),
                )
            )
        return tuple(views)

    def _arm(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(self._period_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            self.check_time()
        except Exception:
            log.exception("the look at the roles failed")
        standings = self._board.standings().values()
        if standings and (self._adaptive or any(s.old_phases or s.unproven for s in standings)):
            self._arm()


_KNOWN: tuple[Phase, ...] = ("encode", "prefill", "decode")


def _has_new_work(instance: Instance, standing: Standing) -> bool:
    """Whether it has been given work of a phase that it must still prove itself in."""
    if "prefill" in standing.unproven and instance.backlog_tokens > 0:
        return True
    return "decode" in standing.unproven and bool(instance.requests)
