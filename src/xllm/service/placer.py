"""From instances to views, from views to a router's placement: the only caller of router policies.

Fills in what a policy may look at, page index included. Sends nothing; observers tell what was decided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xllm.config import FrontConfig
from xllm.errors import InternalError
from xllm.prefix import page_digest, root_digest
from xllm.service.instances.instance import Instance
from xllm.service.kvindex import KvIndex
from xllm.service.roles.board import UNLISTED, RoleBoard, Standing
from xllm.service.router.base import InstanceView, Placement, RequestView, RouterPolicy, RouterSnapshot
from xllm.service.router.disaggregated import place
from xllm.service.router.memory import PlacementMemory
from xllm.types import MIXED, PAGE_SIZE, RequestSpec
from xllm.wire.messages import KvDelta

Chain = tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`num_matched` tokens are readable at the instance now, in any tier. `decode`: where it goes on after
    its first token; None = it stays. `chain` names the full pages of the prompt, `root` is their first
    parent; `holders` says how many of the first ones who has."""

    instance: Instance
    placement: Placement
    num_matched: int
    decode: Instance | None = None
    root: bytes = b""
    chain: Chain = ()
    holders: Mapping[str, int] = field(default_factory=dict)


class Placer:
    """Owns the page index and the memory of placements; loads are read from the instances when asked."""

    def __init__(self, config: FrontConfig, policy: RouterPolicy, board: RoleBoard | None = None) -> None:
        self.index = KvIndex()
        self._board = board if board is not None else RoleBoard()
        self._config = config
        self._policy = policy
        self._turns: Counter[str] = Counter()
        self._memory = PlacementMemory()

    def choose(
        self,
        spec: RequestSpec,
        candidates: Sequence[Instance],
        *,
        emitted: Sequence[int] = (),
        num_emitted: int = 0,
        attempt: int = 0,
        remember: bool = True,
    ) -> Choice | None:
        """Where the request goes; None when no candidate has room. `candidates` are sorted, not empty.

        `emitted` are tokens that follow the prompt in its pages, `num_emitted` those of all choices. What
        was chosen counts as placed there until `settled`, unless it is only asked (`remember` False).
        """
        prompt = spec.prompt_token_ids
        view = RequestView(
            request_id=spec.request_id,
            model=spec.model,
            num_prompt_tokens=len(prompt),
            num_choices=spec.params.n,
            max_tokens=spec.params.max_tokens or 1,
            cls=spec.cls,
            priority=spec.priority,
            slo=spec.slo,
            attempt=attempt,
            num_emitted=num_emitted,
        )
        classes = {i.card.numerics_class for i in candidates}
        chains = {cls: _chain(cls, spec, (*prompt, *emitted)) for cls in classes}
        found = {cls: self.index.match(chain) for cls, chain in chains.items()}
        names = [i.name for i in candidates]
        recent_ms = self._memory.recent_ms(names)
        views = []
        for i in candidates:
            cls = i.card.numerics_class
            matched = self._memory.matched(i.name, chains[cls], found[cls].get(i.name, ()))
            views.append(_view(i, matched, recent_ms[i.name], self._board.standing(i.name)))
        snapshot = RouterSnapshot(instances=tuple(views), turn=self._turns[spec.model])
        placement = place(self._policy, view, snapshot, self._config)
        if placement is None:
            return None
        chosen = _named(placement.instance, candidates)
        decode = None if placement.decode is None else _named(placement.decode, candidates)
        cls = chosen.card.numerics_class
        if remember:
            self._turns[spec.model] += 1
            self._memory.placed(spec.request_id, chosen.name, placement.work_ms, names, chains[cls])
        holders = {name: sum(num for _, num in tiers) for name, tiers in found[cls].items()}
        return Choice(
            instance=chosen,
            placement=placement,
            num_matched=holders.get(chosen.name, 0) * PAGE_SIZE,
            decode=None if decode is chosen else decode,
            root=root_digest(cls, spec.adapter, spec.cache_salt),
            chain=chains[cls],
            holders=holders,
        )

    def direct(
        self, spec: RequestSpec, instance: Instance, *, reasons: tuple[str, ...], num_matched: int = 0
    ) -> Choice:
        """No choice: its pages are, or may be, at this instance. Remembered as any other placement."""
        chain = _chain(instance.card.numerics_class, spec, spec.prompt_token_ids)
        self._memory.placed(spec.request_id, instance.name, 0.0, (), chain)
        placement = Placement(instance=instance.name, reasons=reasons)
        return Choice(instance=instance, placement=placement, num_matched=num_matched)

    def settled(self, request_id: str) -> None:
        """It has left its instance or ended, or was not placed after all. An answer settles nothing: the
        index may hear of the pages a little later, and until then they would count for nothing."""
        self._memory.settled(request_id)

    def views(self, instances: Sequence[Instance]) -> tuple[InstanceView, ...]:
        """Loads and roles alone, for a judgement that asks for no prompt."""
        return tuple(_view(i, (), 0.0, self._board.standing(i.name)) for i in instances)

    def learn(self, instance: Instance, delta: KvDelta) -> bool:
        """What an instance says of its pages; False = something was missed, it must tell all again."""
        return self.index.apply(instance.name, delta)

    def forget(self, name: str) -> None:
        """The instance is gone, and what it had with it."""
        self.index.purge(name)
        self._memory.purge(name)
        self._board.left(name)


def _named(name: str, candidates: Sequence[Instance]) -> Instance:
    chosen = next((i for i in candidates if i.name == name), None)
    if chosen is None:
        raise InternalError("the router policy chose an instance that it was not offered")
    return chosen


def load_views(instances: Sequence[Instance]) -> tuple[InstanceView, ...]:
    """The loads alone, for a judgement that asks for no prompt and no role."""
    return tuple(_view(i, (), 0.0, UNLISTED) for i in instances)


def _view(
    instance: Instance,
    matched: tuple[tuple[str, int], ...],
    recent_ms: float,
    standing: Standing,
) -> InstanceView:
    # Without a way for its pages an instance has to do for a request all that it does: its role is a name.
    can_share = bool(instance.about.endpoints)
    return InstanceView(
        name=instance.name,
        num_reqs=len(instance.requests),
        max_reqs=instance.max_reqs,
        engine=instance.snapshot,
        backlog_tokens=instance.backlog_tokens,
        context_tokens=instance.context_tokens,
        matched=matched,
        recent_ms=recent_ms,
        phases=standing.phases if can_share else MIXED,
        old_phases=standing.old_phases if can_share else frozenset(),
        coming_reqs=len(instance.inbound),
        coming_tokens=sum(instance.inbound.values()),
    )


def _chain(numerics_class: str, spec: RequestSpec, tokens: Sequence[int]) -> Chain:
    """Digests of the full pages."""
    digest = root_digest(numerics_class, spec.adapter, spec.cache_salt)
    chain: list[bytes] = []
    for start in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        digest = page_digest(digest, tokens[start : start + PAGE_SIZE])
        chain.append(digest)
    return tuple(chain)
