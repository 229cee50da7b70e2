"""From tokens of one choice to text that may be shown: detokenizer, then stop strings.

Pure state per choice; knows nothing of requests, frames or time. Which tokens count as output
is the journal's decision.
"""

from __future__ import annotations

from typing import Protocol

from xllm.text.assets import TextAssets
from xllm.text.detokenizer import IncrementalDetokenizer
from xllm.text.stop import StopChecker
from xllm.types import SamplingParams


class ChoiceText(Protocol):
    """Text of one choice as its tokens arrive."""

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Text that became safe to show, and the stop string that this token completed, if any.

        After a match nothing more may be pushed.
        """

    def finish(self) -> tuple[str, str | None]:
        """What was held back, once no token follows; it too may complete a stop string."""


class NoText:
    """For `detokenize=False`."""

    def push(self, token_id: int) -> tuple[str, str | None]:
        return "", None

    def finish(self) -> tuple[str, str | None]:
        return "", None


class DecodedText:
    """Detokenizer and, when asked for, stop strings.

    A stop string counts when the token that completes it is not among the first `min_tokens`.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer, params: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._stops = params.stop_strings
        self._include = params.include_stop_str_in_output
        self._checker = StopChecker(self._stops, self._include) if self._stops else None
        self._num_immune = params.min_tokens
        self._held = ""

    def push(self, token_id: int) -> tuple[str, str | None]:
        text = self._detokenizer.push_one(token_id)
        if self._checker is None:
            return text, None
        immune = self._num_immune > 0
        self._num_immune -= immune
        return self._search(text, immune=immune)

    def finish(self) -> tuple[str, str | None]:
        safe, match = self._search(self._detokenizer.finish(), immune=self._num_immune > 0)
        return (safe, match) if match is not None else (safe + self._held, None)

    def _search(self, text: str, *, immune: bool) -> tuple[str, str | None]:
        if self._checker is None:
            return text, None
        self._held += text
        safe, match = self._checker.push(text)
        if match is None:
            self._held = self._held[len(safe) :]
            return safe, None
        if not immune:
            return safe, match
        # Too early to stop: what was held back is text like any other, and the search starts anew.
        safe, self._held = self._held, ""
        self._checker = StopChecker(self._stops, self._include)
        return safe, None


def choice_text(assets: TextAssets, params: SamplingParams) -> ChoiceText:
    """The text pipeline for one choice of a request with these parameters."""
    if not params.detokenize:
        return NoText()
    detokenizer = IncrementalDetokenizer(assets.tokenizer, skip_special_tokens=params.skip_special_tokens)
    return DecodedText(detokenizer, params)
