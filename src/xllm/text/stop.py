"""Stop strings over a stream of text: what is safe to show, and where the first match lies.

The result does not depend on how the text is cut into pieces. Knows nothing of tokens; a caller
that pushes the text of one token at a time knows by the return value which token completed a stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`text[start:end] == stop`, offsets in characters of all text pushed."""

    stop: str
    start: int
    end: int


class StopChecker:
    """Finds the stop string that is completed first; of two that end together, the longer one.

    Time is O(characters × stops) over the life of the stream, memory O(longest stop).
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        """Raises ValueError for an empty stop string: it would match everywhere."""
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty")
        self._matchers = [_Matcher(stop) for stop in dict.fromkeys(stops)]
        self._include = include_in_output
        self._held = ""
        self._num_seen = 0
        self.match: StopMatch | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that can be shown now, and the stop string if one was completed by `text`.

        After a match everything further is dropped. What could still become a stop is held back.
        """
        if self.match is not None:
            return "", None
        if not self._matchers:
            self._num_seen += len(text)
            return text, None
        for i, char in enumerate(text):
            found = None
            for matcher in self._matchers:
                if matcher.feed(char) and (found is None or len(matcher.stop) > len(found)):
                    found = matcher.stop
            if found is not None:
                return self._matched(found, text[: i + 1])
        self._num_seen += len(text)
        buffer = self._held + text
        cut = len(buffer) - max(matcher.state for matcher in self._matchers)
        self._held = buffer[cut:]
        return buffer[:cut], None

    def flush(self) -> str:
        """The text held back, once the stream has ended without a match."""
        held, self._held = self._held, ""
        return held

    def _matched(self, stop: str, text: str) -> tuple[str, str]:
        self._num_seen += len(text)
        self.match = StopMatch(stop, self._num_seen - len(stop), self._num_seen)
        buffer = self._held + text
        self._held = ""
        return buffer if self._include else buffer[: len(buffer) - len(stop)], stop


class _Matcher:
    """Knuth–Morris–Pratt: `state` is the length of the longest suffix seen that starts `stop`."""

    __slots__ = ("_failure", "state", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self._failure = [0] * len(stop)
        k = 0
        for i in range(1, len(stop)):
            while k and stop[i] != stop[k]:
                k = self._failure[k - 1]
            if stop[i] == stop[k]:
                k += 1
            self._failure[i] = k

    def feed(self, char: str) -> bool:
        """Take one character; True when it completes the stop."""
        while self.state and char != self.stop[self.state]:
            self.state = self._failure[self.state - 1]
        if char == self.stop[self.state]:
            self.state += 1
        return self.state == len(self.stop)
