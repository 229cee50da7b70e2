"""Which models the front serves, by which instances, with which text assets.

Names resolve here and nowhere else. Assets are kept by digest, so that two instances of one
model, or two models of one family, share a tokenizer.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping

from xllm.errors import NotFoundError, UnavailableError
from xllm.service.instances.instance import Instance
from xllm.text.assets import TextAssets
from xllm.types import ModelCard

_TextKey = tuple[tuple[str, str], ...]
"""(name, digest) of every asset."""

NO_INSTANCE_RETRY_S = 1.0
"""Told to refused clients; a crashed engine is back within seconds, or the next try says so again."""

_MAX_MAKING = 8
"""An engine that keeps sending assets is not believed for long."""


_MAX_GONE = 64
"""Models without an instance that are remembered."""


class Catalogue:
    """A model is known as long as an instance of it is there, and after its loss until it is forgotten.

    A lost instance stays listed only if it was its model's last: the model is known but cannot be served.
    """

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}
        self._forget_s: dict[str, float] = {}
        self._names: dict[str, str] = {}
        self._bytes: dict[str, bytes] = {}
        self._text: dict[_TextKey, TextAssets] = {}
        self._making: dict[_TextKey, asyncio.Task[TextAssets]] = {}

    def prepare(self, assets: Mapping[str, bytes]) -> None:
        """Make the text of these assets in the background, for the `add` whose card names their digests."""
        key = tuple(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in assets.items()))
        if key not in self._text and key not in self._making and len(self._making) < _MAX_MAKING:
            making = asyncio.create_task(asyncio.to_thread(TextAssets.from_card_assets, assets))
            making.add_done_callback(_seen)
            self._making[key] = making

    async def add(self, instance: Instance) -> None:
        """Fetch what text assets are not known yet, then list the instance under its model's names.

        Raises UnavailableError when the engine cannot give its assets or is lost, ConfigError when they are
        unusable, ValueError when an instance of that name is alive.
        """
        if instance.name in self._instances and self._instances[instance.name].alive:
            raise ValueError(f"instance name {instance.name} is taken")
        key = _text_key(instance.card)
        making = self._making.pop(key, None)
        if making is not None:
            self._text[key] = await making
        if key not in self._text:
            for digest in instance.card.assets.values():
                if digest not in self._bytes:
                    self._bytes[digest] = await instance.fetch(digest)
            assets = {name: self._bytes[digest] for name, digest in instance.card.assets.items()}
            # A big vocabulary takes a second to load; the loop has other requests to serve.
            self._text[key] = await asyncio.to_thread(TextAssets.from_card_assets, assets)
        if not instance.alive:
            raise UnavailableError("the instance was lost while it was added", code="engine_lost")
        self._instances[instance.name] = instance
        instance.started = True
        self._drop_lost(instance.card.model_id)
        # A model's own id beats another model's alias; between aliases the first one stays.
        self._names[instance.card.model_id] = instance.card.model_id
        for alias in instance.card.aliases:
            self._names.setdefault(alias, instance.card.model_id)

    async def close(self) -> None:
        """End what was begun for instances that never came."""
        making = list(self._making.values())
        self._making.clear()
        for task in making:
            task.cancel()
        await asyncio.gather(*making, return_exceptions=True)

    def instances(self) -> tuple[Instance, ...]:
        """All, sorted by name."""
        return tuple(sorted(self._instances.values(), key=lambda i: i.name))

    def cards(self) -> list[ModelCard]:
        """One card per model, the first alive instance's where there is one."""
        cards: dict[str, ModelCard] = {}
        for instance in sorted(self.instances(), key=lambda i: not i.alive):
            cards.setdefault(instance.card.model_id, instance.card)
        return list(cards.values())

    def get(self, name: str) -> Instance | None:
        """The instance of that name, if it has not been lost."""
        instance = self._instances.get(name)
        return instance if instance is not None and instance.alive else None

    def serving(self, model: str) -> tuple[Instance, ...]:
        """Instances of the model that take requests, sorted by name, at least one.

        Raises NotFoundError for an unknown name, UnavailableError when there is none.
        """
        routable = tuple(i for i in self._of(model) if i.routable)
        if not routable:
            raise no_instance()
        return routable

    def routable(self, model_id: str) -> tuple[Instance, ...]:
        """Instances that take requests of the model (its id, not an alias), sorted by name."""
        return tuple(i for i in self.instances() if i.routable and i.card.model_id == model_id)

    def lost(self, instance: Instance, *, forget_s: float | None) -> None:
        """The instance is gone. `forget_s`: its model may be forgotten then, unless it comes back.

        None = it was not asked to go, so its model stays known: it is expected back.
        """
        model_id = instance.card.model_id
        if forget_s is not None:
            self._forget_s[model_id] = forget_s
        self._drop_lost(model_id)
        gone = [i for i in self._instances.values() if not i.alive]
        for old in gone[: max(0, len(gone) - _MAX_GONE)]:
            self._forget(old.card.model_id)

    def expire(self, now_s: float) -> None:
        """Forget the models whose time has come."""
        for model_id in [m for m, due_s in self._forget_s.items() if now_s >= due_s]:
            self._forget(model_id)

    def _drop_lost(self, model_id: str) -> None:
        of_model = [i for i in self._instances.values() if i.card.model_id == model_id]
        last = next((i for i in reversed(of_model) if i.alive), of_model[-1] if of_model else None)
        for instance in of_model:
            if not instance.alive and instance is not last:
                del self._instances[instance.name]
        if last is not None and last.alive:
            self._forget_s.pop(model_id, None)

    def _forget(self, model_id: str) -> None:
        self._forget_s.pop(model_id, None)
        for instance in tuple(self._instances.values()):
            if instance.card.model_id == model_id and not instance.alive:
                del self._instances[instance.name]
        if any(i.card.model_id == model_id for i in self._instances.values()):
            return
        self._names = {name: target for name, target in self._names.items() if target != model_id}

    def text(self, model: str) -> TextAssets:
        """Raises NotFoundError for an unknown name."""
        return self._text[_text_key(self._of(model)[0].card)]

    def _of(self, model: str) -> tuple[Instance, ...]:
        model_id = self._names.get(model)
        if model_id is None:
            raise NotFoundError("the model does not exist", code="model_not_found", param="model")
        return tuple(i for i in self.instances() if i.card.model_id == model_id)


def no_instance() -> UnavailableError:
    """The answer while no instance can take a request of a known model."""
    return UnavailableError("no instance can serve this model now", retry_after_s=NO_INSTANCE_RETRY_S)


def _text_key(card: ModelCard) -> _TextKey:
    return tuple(sorted(card.assets.items()))


def _seen(making: asyncio.Task[TextAssets]) -> None:
    """Who adds the instance gets the error; if nobody does, it is no news."""
    if not making.cancelled():
        making.exception()
