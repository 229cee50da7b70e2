"""The I/O thread of an engine: all its fronts, those that would like to be one, and the pulse.

One thread blocked in a selector: reads frames, writes what sockets did not take at once, accepts,
enforces time limits, and every PULSE_S tells each front how far the step is. It decides nothing about
requests: messages go to `inbox`, for the step thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import selectors
import socket
import threading
from collections import deque

from xllm.clock import Clock
from xllm.engine.link import Link, LinkCounters, LinkLimits
from xllm.engine.port import Inbox
from xllm.engine.progress import StepProgress
from xllm.engine.session import Session
from xllm.errors import XllmError
from xllm.wire.codec import WireError
from xllm.wire.hello import FRONT, Handshake, Identity
from xllm.wire.messages import PULSE_S, Pulse
from xllm.wire.sockets import tune

log = logging.getLogger(__name__)

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_LOGGED_PER_TICK = 4
"""Lines about unwelcome peers; whoever floods the port shall not flood the log as well."""


class Hub:
    """`adopt` and `listen` before `start`. `counters` may be read by any thread."""

    def __init__(self, progress: StepProgress | None, clock: Clock, limits: LinkLimits | None = None) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.counters = LinkCounters()
        self._progress = progress
        self._clock = clock
        self._limits = limits or LinkLimits()
        self._links: dict[Session, Link] = {}
        self._listener: socket.socket | None = None
        self._identity: Identity | None = None
        self._accepting = False
        self._next_number = 0
        self._to_flush: deque[Session] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_recv, self._wake_send = socket.socketpair()
        self._wake_recv.setblocking(False)
        self._wake_send.setblocking(False)
        self._selector.register(self._wake_recv, _READ)
        self._closing = threading.Event()
        self._num_logged = 0
        self._thread = threading.Thread(target=self._run, name="engine-io", daemon=True)

    def adopt(self, sock: socket.socket) -> Session:
        """Take over an inherited socket, where nobody else can be at the other end."""
        return self._add(sock, "the front that started this engine", None).session

    def listen(self, listener: socket.socket, identity: Identity) -> None:
        """Take over a listening socket; whoever connects must shake hands."""
        listener.setblocking(False)
        self._listener, self._identity = listener, identity
        self._accept_again()

    def start(self) -> None:
        self._thread.start()

    def tell_progress(self, progress: StepProgress) -> None:
        """From now on sessions that are `pulsing` get pulses of it."""
        self._progress = progress

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, let fronts read it, then close everything."""
        self._closing.set()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:
            log.exception("the I/O thread failed; all fronts are cut off")
        finally:
            for link in tuple(self._links.values()):
                self._drop(link)
            self._stop_listening()
            self._selector.close()
            self._wake_recv.close()
            self._wake_send.close()
            self.inbox.put((None, None))

    def _loop(self) -> None:
        tick_s = self._clock.monotonic_s() + PULSE_S
        while not (self._closing.is_set() and self._all_gone()):
            now_s = self._clock.monotonic_s()
            if now_s >= tick_s:
                tick_s = now_s + PULSE_S
                self._tick(now_s)
            for key, events in self._selector.select(max(0.0, tick_s - now_s)):
                if key.fileobj is self._wake_recv:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_recv.recv(4096)
                elif key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, Link):
                    self._serve(key.data, events)
            while self._to_flush:
                link = self._links.get(self._to_flush.popleft())
                if link is not None:
                    self._settle(link)

    def _all_gone(self) -> bool:
        self._stop_listening()
        for link in tuple(self._links.values()):
            if not link.session.ending:
                link.session.ending = True
                self._settle(link)
        return not self._links

    def _serve(self, link: Link, events: int) -> None:
        if events & _READ and not self._read(link):
            return
        self._settle(link)

    def _read(self, link: Link) -> bool:
        """Whether the link lives on."""
        try:
            messages = link.read(self._clock.monotonic_s())
        except BlockingIOError:
            return True
        except OSError:
            messages = None
        except WireError as error:
            return self._drop(link, error.code, error.message)
        except XllmError as error:
            self._count(link, error.code, error.message)
            link.refuse(error, self._clock.monotonic_s())
            return True
        if messages is None:
            cause = None if link.is_proved or link.deaf_since_s is not None else "handshake_ended"
            return self._drop(link, cause, "it left during the hand-shake")
        for message in messages:
            self.inbox.put((link.session, message))
        return True

    def _settle(self, link: Link) -> None:
        """Write what can be written and wait for what must be waited for."""
        session = link.session
        if session.overflowed:
            self._drop(link, "slow_reader", "it reads too slowly")
            return
        written = session.flush()
        if session.ending and written:
            if not link.lingers:
                self._drop(link)
                return
            link.leave(self._clock.monotonic_s())
            with contextlib.suppress(OSError):
                session.sock.shutdown(socket.SHUT_WR)
        wanted = (0 if link.must_pause() else _READ) | (0 if written else _WRITE)
        if wanted == link.wanted:
            return
        if not wanted:
            self._selector.unregister(session.sock)
        elif not link.wanted:
            self._selector.register(session.sock, wanted, link)
        else:
            self._selector.modify(session.sock, wanted, link)
        link.wanted = wanted

    def _tick(self, now_s: float) -> None:
        self._num_logged = 0
        progress = self._progress
        for link in tuple(self._links.values()):
            late = link.overdue(now_s)
            if late is not None:
                # One that was told to leave has been counted already, if it was at fault.
                self._drop(link, None if link.deaf_since_s is not None else late, "its time is over")
            elif link.session.pulsing and progress is not None and not link.session.backlog_bytes:
                link.session.send(pulse_of(progress, now_s))
                self._settle(link)
            else:
                self._settle(link)
        self._accept_again()

    # -- accepting ----------------------------------------------------------------------------

    def _accept(self) -> None:
        listener, identity = self._listener, self._identity
        if listener is None or identity is None:
            return
        try:
            sock, address = listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # Out of descriptors, as a rule: until the next tick nobody is let in, instead of a busy loop.
            log.exception("cannot accept a front")
            self._selector.unregister(listener)
            self._accepting = False
            return
        self.counters.num_accepted += 1
        where = f"{address[0]}:{address[1]}"
        self._make_room()
        if sum(link.is_proved for link in self._links.values()) >= self._limits.max_sessions:
            self.counters.drop("too_many_fronts")
            self._log("front %s was not taken: %d are connected already", where, self._limits.max_sessions)
            sock.close()
            return
        handshake = Handshake(identity, accepts=FRONT, connecting=False)
        link = self._add(sock, where, handshake)
        link.session.send(handshake.hello)
        self._settle(link)

    def _make_room(self) -> None:
        """The oldest unfinished hand-shake goes first: an honest one takes milliseconds."""
        unproved = [link for link in self._links.values() if not link.is_proved]
        if len(unproved) >= self._limits.max_handshakes:
            self._drop(unproved[0], "too_many_handshakes", "too many hand-shakes at a time")

    def _accept_again(self) -> None:
        if self._listener is not None and not self._accepting:
            self._selector.register(self._listener, _READ)
            self._accepting = True

    def _stop_listening(self) -> None:
        if self._listener is not None:
            if self._accepting:
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    # -- links --------------------------------------------------------------------------------

    def _add(self, sock: socket.socket, where: str, handshake: Handshake | None) -> Link:
        sock.setblocking(False)
        tune(sock)
        session = Session(sock, self._next_number, self._flush_later)
        self._next_number += 1
        now_s = self._clock.monotonic_s()
        link = Link(session, self._limits, self.counters, where=where, now_s=now_s, handshake=handshake)
        self._links[session] = link
        self._selector.register(sock, _READ, link)
        link.wanted = _READ
        return link

    def _drop(self, link: Link, cause: str | None = None, why: str = "") -> bool:
        """Always False: the link does not live on."""
        if self._links.pop(link.session, None) is not None:
            if link.wanted:
                self._selector.unregister(link.session.sock)
            link.session.close()
            if link.is_proved:
                self.inbox.put((link.session, None))
            if cause is not None:
                self._count(link, cause, why)
        return False

    def _count(self, link: Link, cause: str, why: str) -> None:
        self.counters.drop(cause)
        self._log("front %s was dropped: %s (%s)", link.where, why, cause)

    def _log(self, text: str, *values: object) -> None:
        self._num_logged += 1
        if self._num_logged <= _LOGGED_PER_TICK:
            log.warning(text, *values)

    # -- from other threads -------------------------------------------------------------------

    def _flush_later(self, session: Session) -> None:
        self._to_flush.append(session)
        self._wake()

    def _wake(self) -> None:
        # Full of wake-ups already, or closed and nobody to wake.
        with contextlib.suppress(OSError):
            self._wake_send.send(b"\0")


def pulse_of(progress: StepProgress, now_s: float) -> Pulse:
    """What a front is told of the step that runs."""
    busy = progress.busy
    return Pulse(
        step=progress.turn,
        layer=progress.layer() if busy else 0,
        busy=busy,
        step_age_ms=max(0.0, now_s - progress.since_s) * 1000 if busy else 0.0,
        predicted_ms=progress.predicted_ms if busy else 0.0,
    )
