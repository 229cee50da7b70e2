"""`x-xllm-explain: 1`: the numbers behind a request ride in its response, under `xllm`.

The same values as `GET /requests/{id}` gives. Never text or tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xllm.api.context import Context
from xllm.api.http import Request
from xllm.errors import RequestError

HEADER = "x-xllm-explain"


def wants_explanation(request: Request) -> bool:
    """Raises RequestError for anything but 0 and 1."""
    values = request.head.values(HEADER.encode())
    if not values:
        return False
    if len(values) > 1 or values[0] not in (b"0", b"1"):
        raise RequestError(f"The {HEADER} header must be 0 or 1.", param=HEADER)
    return values[0] == b"1"


def explanation(context: Context, request_ids: Iterable[str]) -> dict[str, Any]:
    """The member `xllm` of a response to these requests."""
    return {"requests": [told for i in request_ids for told in context.desk.timelines.find(i)]}
