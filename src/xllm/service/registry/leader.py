"""One of several processes leads, as far as anybody can know: a held key, self-demotion, fencing epochs.

An election alone never makes one actor: a leader may be paused after it looked. So whatever a
leader changes carries `epoch`, and who is told refuses an older one (`Fence`).
"""

from __future__ import annotations

import asyncio
import logging

from xllm.clock import Clock
from xllm.errors import UnavailableError
from xllm.service.registry.backoff import Backoff
from xllm.service.registry.base import Registry
from xllm.service.registry.held_key import HeldKey

log = logging.getLogger(__name__)


class Leadership:
    """Competes for `/<cluster>/v1/leaders/<name>` until closed."""

    def __init__(
        self, registry: Registry, cluster: str, name: str, candidate: str, *, ttl_s: float, clock: Clock
    ) -> None:
        self._key = HeldKey(registry, f"/{cluster}/v1/leaders/{name}", ttl_s=ttl_s, clock=clock)
        self._value = candidate.encode()
        self._backoff = Backoff()
        self._task: asyncio.Task[None] | None = None

    def epoch(self) -> int:
        """The fencing epoch to act with now, 0 = do not act. Ask before every action; it goes with it.

        By the monotonic clock it turns 0 at two thirds of the lease without a renewal, before anybody
        else can win.
        """
        return self._key.epoch if self._key.may_act() else 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"leader {self._key.key}")

    async def step(self) -> float:
        """Renew or compete once; seconds until the next step. Raises UnavailableError."""
        if not (self._key.held and await self._key.renew(self._value)):
            await self._key.claim(self._value)
        return self._key.ttl_s / 3

    async def close(self) -> None:
        """Stop and let the next one lead at once."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        try:
            await self._key.release()
        except UnavailableError:
            log.debug("the registry does not answer; the leader's lease will expire")

    async def _run(self) -> None:
        while True:
            try:
                pause_s = await self.step()
                self._backoff.reset()
            except UnavailableError:
                pause_s = self._backoff.delay_s()
            except Exception:
                log.exception("%s: competing for the lead failed; trying again", self._key.key)
                pause_s = self._key.ttl_s / 3
            await asyncio.sleep(pause_s)


class Fence:
    """The receiver's half: accepts an epoch unless a greater one was seen."""

    def __init__(self) -> None:
        self._greatest = 0

    def admit(self, epoch: int) -> bool:
        if epoch <= 0 or epoch < self._greatest:
            return False
        self._greatest = epoch
        return True
