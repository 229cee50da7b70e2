"""What the front gives back for a request: deltas of text and tokens, then usage.

The nouns between `service` (which makes them) and `api`, `llm` (which translate them). No HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from xllm.types import TokenLogprobs


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New, committed output of one choice.

    `text` is what the new tokens add once partial UTF-8 and possible stop strings are held back
    (it may be empty). `finish_reason` is set on the last delta of the choice and then
    `stop_reason` names the stop string or stop token id, None for EOS.
    `prompt_logprobs` comes once, with the first delta of choice 0: one entry per prompt token
    after the first.
    """

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a whole request; output cut off by a stop string's overrun is not counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class RequestStream(Protocol):
    """The output of one admitted request. Iterate to the end, or `aclose()` to abort it.

    Ends normally after every choice has a delta with `finish_reason`; raises an XllmError when
    the request failed. Leaving early (GeneratorExit, cancellation) aborts the request.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def aclose(self) -> None: ...

    def usage(self) -> Usage: ...
