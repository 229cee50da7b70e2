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

_MAX_MAKING = 8
"""An engine that keeps sending assets is not believed for long."""


class Catalogue:
    """Lost instances stay listed as not alive: their model is known but cannot be served."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}
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

        Raises UnavailableError when the engine cannot give its assets, ConfigError when they are
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
        self._instances[instance.name] = instance
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

    def serving(self, model: str) -> tuple[Instance, ...]:
        """Alive instances of the model, sorted by name, at least one.

        Raises NotFoundError for an unknown name, UnavailableError when no instance is alive.
        """
        alive = tuple(i for i in self._of(model) if i.alive)
        if not alive:
            raise UnavailableError("no instance can serve this model now")
        return alive

    def text(self, model: str) -> TextAssets:
        """Raises NotFoundError for an unknown name."""
        return self._text[_text_key(self._of(model)[0].card)]

    def _of(self, model: str) -> tuple[Instance, ...]:
        model_id = self._names.get(model)
        if model_id is None:
            raise NotFoundError("the model does not exist", code="model_not_found", param="model")
        return tuple(i for i in self.instances() if i.card.model_id == model_id)


def _text_key(card: ModelCard) -> _TextKey:
    return tuple(sorted(card.assets.items()))


def _seen(making: asyncio.Task[TextAssets]) -> None:
    """Who adds the instance gets the error; if nobody does, it is no news."""
    if not making.cancelled():
        making.exception()
