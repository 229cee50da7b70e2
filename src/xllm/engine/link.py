"""One connection as the I/O thread sees it: hand-shake, frames, bounds and time limits of a peer.

What arrives before the hand-shake is done goes to `wire.hello` only. No threads, no selector: `hub` says
when there is something to read and what the time is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from xllm.engine.session import Session
from xllm.errors import XllmError
from xllm.wire.codec import FrameSplitter, UnknownMessageError, WireError, decode_front
from xllm.wire.hello import (
    HANDSHAKE_S,
    MAX_HANDSHAKE_BYTES,
    MAX_HANDSHAKE_FRAME_BYTES,
    Handshake,
    refusal,
)
from xllm.wire.messages import WIRE_VERSION, FrontMessage, Refused

READ_BYTES = 1 << 16
"""Below the size from which the allocator maps and unmaps memory for every read."""


LINGER_S = 0.5
"""How long a peer may take to close its side after ours was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """`max_frame_bytes`: a decoded prompt takes eight times its frame. `max_unread`, `max_unread_bytes`: what
    may wait for the step thread before no more is read from a session."""

    max_sessions: int = 64
    max_handshakes: int = 32
    max_frame_bytes: int = 16 * 1024 * 1024
    max_unread: int = 1024
    max_unread_bytes: int = 32 * 1024 * 1024
    handshake_s: float = HANDSHAKE_S
    frame_s: float = 30.0
    stall_s: float = 30.0


@dataclass(slots=True)
class LinkCounters:
    """Written by the I/O thread. `dropped` by cause: codes of hand-shakes, `wire_error`, `slow_reader` …"""

    num_accepted: int = 0
    num_skipped: int = 0
    num_dropped: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def drop(self, cause: str) -> None:
        self.num_dropped += 1
        self.dropped[cause] += 1


class Link:
    """`where` names the peer in logs. Without a hand-shake the socket was inherited and is trusted."""

    def __init__(
        self,
        session: Session,
        limits: LinkLimits,
        counters: LinkCounters,
        *,
        where: str,
        now_s: float,
        handshake: Handshake | None = None,
    ) -> None:
        self.session = session
        self.lingers = handshake is not None
        self.where = where
        self.wanted = 0
        self.paused = False
        self._limits = limits
        self._counters = counters
        self._handshake = handshake
        self._splitter = FrameSplitter(
            limits.max_frame_bytes if handshake is None else MAX_HANDSHAKE_FRAME_BYTES
        )
        self.deaf_since_s: float | None = None
        self._num_early_bytes = 0
        self._began_s = now_s
        self._frame_since_s = now_s
        self._stuck_since_s: float | None = None
        self._stuck_at = 0
        self._num_given = 0
        self._given_bytes = 0

    @property
    def is_proved(self) -> bool:
        return self._handshake is None

    def read(self, now_s: float) -> list[FrontMessage] | None:
        """The messages that arrived, None at EOF. Raises WireError for what is not the protocol and
        XllmError for a hand-shake that fails."""
        data = self.session.sock.recv(READ_BYTES)
        if not data:
            return None
        if self._handshake is not None:
            self._num_early_bytes += len(data)
            if self._num_early_bytes > MAX_HANDSHAKE_BYTES:
                raise WireError("too much before the hand-shake was done")
        if self.deaf_since_s is not None:
            return []
        if not self._splitter.has_partial:
            self._frame_since_s = now_s
        self._splitter.put(data)
        messages: list[FrontMessage] = []
        while (body := self._splitter.take()) is not None:
            self._frame_since_s = now_s
            if self._handshake is not None:
                self._shake(self._handshake, body)
            else:
                self._decode(body, messages)
        return messages

    def refuse(self, error: XllmError, now_s: float) -> None:
        """Tell the peer why it is not let in."""
        self.session.send(refusal(error))
        self.session.end()
        self.leave(now_s)

    def leave(self, now_s: float) -> None:
        """From now on what arrives is thrown away: closing over unread bytes would reset the connection, and
        that destroys what was sent last, at the peer."""
        if self.deaf_since_s is None:
            self.deaf_since_s = now_s

    def overdue(self, now_s: float) -> str | None:
        """Why the connection should be dropped for being late, if it should."""
        limits = self._limits
        if self.deaf_since_s is not None:
            return "deaf" if now_s - self.deaf_since_s > LINGER_S else None
        if self._handshake is not None:
            return "handshake_timeout" if now_s - self._began_s > limits.handshake_s else None
        if self._splitter.has_partial and now_s - self._frame_since_s > limits.frame_s:
            return "frame_timeout"
        backlog = self.session.backlog_bytes
        if not backlog or backlog != self._stuck_at or self._stuck_since_s is None:
            self._stuck_at, self._stuck_since_s = backlog, now_s
        elif now_s - self._stuck_since_s > limits.stall_s:
            return "slow_reader"
        return None

    def must_pause(self) -> bool:
        """Whether the step thread has enough to do with what was given to it."""
        unread = self._num_given - self.session.taken
        if not unread:
            self._given_bytes = 0
        if unread <= self._limits.max_unread and self._given_bytes <= self._limits.max_unread_bytes:
            return False
        # It may have taken the last one meanwhile, and then nobody would call.
        self.session.resume_at = self._num_given
        return self._num_given > self.session.taken

    def _shake(self, handshake: Handshake, body: bytes) -> None:
        for answer in handshake.feed(body):
            self.session.send(answer)
        if handshake.done and handshake.peer is not None:
            self.session.version = min(handshake.peer.version, WIRE_VERSION)
            self.where = f"{handshake.peer.peer_id[:64]!r} at {self.where}"
            self._handshake = None
            self._splitter.max_bytes = self._limits.max_frame_bytes

    def _decode(self, body: bytes, messages: list[FrontMessage]) -> None:
        try:
            message = decode_front(body)
        except UnknownMessageError:
            self._counters.num_skipped += 1
            return
        if isinstance(message, Refused):
            raise WireError(f"it refuses: {message.error.message[:256]!r}")
        self._num_given += 1
        self._given_bytes += len(body)
        messages.append(message)
