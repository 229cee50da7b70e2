"""The text side of a model as bytes (from a file or from an engine over the wire) made usable.

Names of assets: "tokenizer" (tokenizers JSON), "chat_template" (Jinja, optional), "text_config"
(JSON with special token ids). Nothing here fetches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xllm.errors import ConfigError
from xllm.text.template import ChatTemplate
from xllm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextAssets:
    """`template` is None for a model without one (a base model)."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    text_config: Mapping[str, Any]

    @classmethod
    def from_card_assets(cls, assets: Mapping[str, bytes]) -> TextAssets:
        """From the bytes of a model card's assets. Raises ConfigError when they are unusable."""
        if "tokenizer" not in assets:
            raise ConfigError("tokenizer: the model has none")
        try:
            config = json.loads(assets.get("text_config", b"{}"))
            source = assets["chat_template"].decode("utf-8") if "chat_template" in assets else None
        except ValueError as error:
            raise ConfigError("text_config or chat_template of the model cannot be read") from error
        if not isinstance(config, dict):
            raise ConfigError("text_config of the model is not an object")
        template = ChatTemplate(source, config) if source is not None else None
        return cls(Tokenizer(assets["tokenizer"], config), template, config)
