"""What the front gives back for a request: deltas of text and tokens, then usage.

The nouns between `service` (which makes them) and `api`, `llm` (which translate them). No HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from xllm.errors import XllmError
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

    Or without iterating: `take` what there is until `ended`, after `wait_ready` or when a listener is
    told; then `error` says how it ended, and `aclose` is due in any case.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    ended: bool
    error: XllmError | None

    async def wait_ready(self) -> None:
        """Return once a delta or the end can be had without waiting. May be cancelled without harm."""

    def take(self) -> Delta | None:
        """The next delta, None when there is none now."""

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call it, on the stack of who brings them, for every delta and the end from now on.

        It must not raise, and must not end this request. At most one listener.
        """

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def aclose(self) -> None: ...

    def usage(self) -> Usage: ...
