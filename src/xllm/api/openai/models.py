"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from xllm.api.context import Context
from xllm.types import ModelCard


def list_models(context: Context) -> dict[str, Any]:
    """Every name a request may use: a model's id, then its aliases."""
    rows = [_row(card, name) for card in context.front.models() for name in (card.model_id, *card.aliases)]
    return {"object": "list", "data": rows}


def get_model(context: Context, name: str) -> dict[str, Any]:
    """Raises NotFoundError(model_not_found)."""
    return _row(context.card(name), name)


def _row(card: ModelCard, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": card.created_s,
        "owned_by": "xllm",
        "root": card.model_id,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [],
    }
