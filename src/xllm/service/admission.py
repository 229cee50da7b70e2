"""Whether one more request may enter the front: two counters and their limits.

Pure: no clock, no I/O. What an instance itself can hold is the router's matter.
"""

from __future__ import annotations

from xllm.errors import CapacityError

RETRY_AFTER_S = 1.0
"""Told to refused clients. The front has no estimate of its drain time yet."""


class Admission:
    """Accepted and not yet ended requests and their prompt tokens, both bounded.

    Every `admit` that returned is matched by exactly one `release` with the same count.
    """

    def __init__(self, *, max_reqs: int, max_tokens: int) -> None:
        self._max_reqs = max_reqs
        self._max_tokens = max_tokens
        self.num_reqs = 0
        self.num_tokens = 0

    def admit(self, num_tokens: int) -> None:
        """Count the request in, or raise CapacityError and count nothing.

        A prompt larger than the token limit is let in when nothing else is: refusing it with
        "try again later" would be a lie.
        """
        full = self.num_reqs >= self._max_reqs
        crowded = self.num_reqs > 0 and self.num_tokens + num_tokens > self._max_tokens
        if full or crowded:
            raise CapacityError("the server is at capacity; try again later", retry_after_s=RETRY_AFTER_S)
        self.num_reqs += 1
        self.num_tokens += num_tokens

    def release(self, num_tokens: int) -> None:
        self.num_reqs -= 1
        self.num_tokens -= num_tokens
