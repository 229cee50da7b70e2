"""The step thread's loop: messages in, steps, frames out. The same for one front or many, over sockets or
in memory.

One owner of the core. Every error of one request becomes that request's terminal frame; a lost front
ends its requests, and only a stop, a drain or a lost device ends the loop.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterable, Mapping

from xllm.engine.core import EngineCore, Outputs
from xllm.engine.kv_news import KvTeller
from xllm.engine.kvtransfer.base import TransferEvent
from xllm.engine.lateness import plan_at_s
from xllm.engine.link import LinkCounters
from xllm.engine.moving.news import TransferNews
from xllm.engine.port import Inbox, Port
from xllm.engine.time_slice import ask_usual_slice
from xllm.engine.tracing import RequestTracer
from xllm.errors import ErrorInfo, UnavailableError, XllmError
from xllm.observability.tracing import NullTracer
from xllm.types import EngineSnapshot, FinishReason
from xllm.wire.messages import (
    Abort,
    Asset,
    AssetRequest,
    Attach,
    CancelTransfer,
    Committed,
    Drain,
    Fetch,
    Frame,
    Frames,
    FrontMessage,
    KvSync,
    Move,
    Profiled,
    Ready,
    StartProfile,
    Stats,
    StopProfile,
    Submit,
)

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""An idle engine says so this often; a silent one is suspect."""
STATS_S = 0.25
"""A busy one tells those fronts that get no frames of it."""


class EngineLoop:
    """`snapshot` is the last one told; any thread may read it."""

    def __init__(
        self,
        core: EngineCore,
        assets: Mapping[str, bytes],
        inbox: Inbox,
        ready: Ready,
        *,
        parent: Port | None = None,
        grace_s: float = 30.0,
        counters: LinkCounters | None = None,
        tracer: RequestTracer | None = None,
        news: TransferNews | None = None,
    ) -> None:
        """`assets` maps digest → bytes. `parent` is the front that started this engine, if one did: it has
        the engine already, and the loop ends with it."""
        self._core = core
        self._assets = assets
        self._inbox = inbox
        self._ready = ready
        self._parent = parent
        self._grace_s = grace_s
        self._counters = counters or LinkCounters()
        self._tracer = tracer or RequestTracer(NullTracer())
        self._fronts: dict[int, Port] = {}
        if news is not None:
            news.fronts = self._fronts
        self._leaving: set[int] = set()
        self._refused: Outputs = {}
        self._kv = KvTeller(core)
        self._drain_end_s: float | None = None
        self._stopped = False
        self._stats_s = 0.0
        self.snapshot: EngineSnapshot = core.snapshot()
        if parent is not None:
            self._welcome(parent)

    def run(self) -> None:
        """Until stopped, drained, or the parent is gone. Every accepted request has ended then."""
        if self._core.steps.overlap:
            # It only plans then. With the slice of those who compute it would wait for theirs to end.
            ask_usual_slice()
        self._kv.tell(may_wait=False)
        ran = False
        while not self._stopped and self._take_messages(may_wait=not ran):
            ran = self._turn()
            if not self._publish(ran):
                break
        self._finish()

    def _turn(self) -> bool:
        """One step of the core. What arrives while it runs still gets into the next one."""
        core = self._core
        # What the transfers said during the last step: a stream stands still for it, so it does not wait
        # for the next one.
        self._tell_news()
        core.begin_turn()
        if not core.steps:
            core.plan()
        if core.may_plan_ahead:
            self._take_messages_until(plan_at_s(core.steps.began_s, core.steps.predicted_ms))
            self._tell_news()
            core.plan()
        return core.collect()

    def _tell_news(self) -> None:
        """What messages led to. Frames first: some of them end the step that is under way."""
        self._send_frames()
        self._answer_moves()

    def _publish(self, ran: bool) -> bool:
        """Send what came due; False = drained, and it ends."""
        self._send_outputs()
        self._answer_moves()
        self._kv.tell(may_wait=ran)
        if self._leaving:
            self._let_go()
        return self._drain_end_s is None or not self._is_drained(self._drain_end_s)

    def _finish(self) -> None:
        self._core.abort_all()
        while self._core.advance():
            continue  # the step under way has rows of requests that are gone

    # -- in -----------------------------------------------------------------------------------

    def _take_messages(self, may_wait: bool) -> bool:
        """Handle what has arrived, waiting for the first if nothing could run; False = end.

        Requests may be alive and yet nothing can run: all wait for their front's commit log.
        """
        inbox = self._inbox
        while True:
            if may_wait:
                self._core.progress.busy = False
            try:
                port, message = inbox.get(block=may_wait, timeout=HEARTBEAT_S)
            except queue.Empty:
                if not may_wait:
                    return True
                self._tell_all(self._fronts.values())
                # Nothing came, but time passed: a drain, a request or a lease may have reached its limit.
                if self._drain_end_s is not None or self._core.has_requests or self._core.mover.is_waiting:
                    return True
                continue
            self._take(port, message)
            if self._stopped:
                return False
            may_wait = False

    def _take_messages_until(self, end_s: float) -> None:
        """Handle what arrives until then, or until the step under way had to be ended for it."""
        core = self._core
        while core.steps and not self._stopped:
            left_s = end_s - core.clock.monotonic_s()
            try:
                port, message = self._inbox.get(block=left_s > 0, timeout=max(left_s, 0.0))
            except queue.Empty:
                return
            self._take(port, message)

    def _take(self, port: Port | None, message: FrontMessage | TransferEvent | None) -> None:
        if port is None:
            self._from_within(message)
        elif message is None:
            self._lose(port)
        else:
            self._handle(port, message)
            port.took()

    def _from_within(self, message: FrontMessage | TransferEvent | None) -> None:
        if isinstance(message, TransferEvent):
            self._core.on_event(message)
        elif isinstance(message, Drain):
            self._drain()
        else:
            self._stopped = True

    def _handle(self, port: Port, message: FrontMessage | TransferEvent) -> None:
        match message:
            case Submit():
                self._submit(port, message)
            case Abort(request_id=request_id):
                self._core.abort(request_id, port.number)
            case Committed(counts=counts):
                for request_id, choice, num_tokens in counts:
                    self._core.scheduler.committed(request_id, choice, num_tokens, port.number)
            case Move():
                self._core.mover.move(port.number, message, self._core.clock.monotonic_s())
            case Fetch():
                self._core.mover.fetch(message)
            case CancelTransfer(transfer_id=transfer_id):
                self._core.mover.cancel(transfer_id)
            case AssetRequest(digest=digest):
                port.send(Asset(digest=digest, data=self._assets.get(digest)))
            case StartProfile(max_events=max_events, max_s=max_s):
                self._core.quiesce()
                self._core.profile.begin(max_events, max_s)
            case StopProfile():
                self._core.quiesce()
                port.send(Profiled(profile=self._core.profile.end()))
            case KvSync():
                self._kv.start_over(port)
            case Attach():
                if port.number not in self._fronts:
                    port.send(self._ready)
                    self._welcome(port)
                    port.send(Stats(snapshot=self._look()))
            case Drain():
                if port is self._parent:
                    self._drain()
                else:
                    self._leaving.add(port.number)
            case _:
                return  # a Hello or Start after the hand-shake says nothing new

    def _welcome(self, port: Port) -> None:
        self._fronts[port.number] = port
        port.pulsing = port.version >= 2
        self._kv.add(port)

    def _lose(self, port: Port) -> None:
        self._fronts.pop(port.number, None)
        self._leaving.discard(port.number)
        self._kv.remove(port)
        num_aborted = self._core.abort_all(port.number)
        if num_aborted:
            log.info("a front is gone; %d requests of it were aborted", num_aborted)
            # The others hear at once that there is room, not with the next regular news.
            self._stats_s = 0.0
        if port is self._parent:
            self._stopped = True

    def _submit(self, port: Port, message: Submit) -> None:
        spec = message.spec
        try:
            if port.number in self._leaving:
                raise UnavailableError("this connection is draining", code="draining", retry_after_s=1.0)
            self._core.submit(spec, port.number, message.transfer_id, message.sources)
            self._tracer.accepted(port.number, spec)
        except XllmError as error:
            self._refuse(port, message, error.info())
        except Exception:
            # A request that trips a bug of ours must not take the engine with it.
            log.exception("a request could not be taken")
            self._refuse(port, message, _REFUSED)

    def _refuse(self, port: Port, message: Submit, info: ErrorInfo) -> None:
        frame = Frame(
            request_id=message.spec.request_id,
            attempt=message.spec.attempt,
            finish_reason=FinishReason.ERROR,
            error=info,
            last=True,
        )
        self._refused.setdefault(port.number, []).append(frame)

    # -- out ----------------------------------------------------------------------------------

    def _send_outputs(self) -> None:
        """Frames, and from time to time news for fronts that get none."""
        outputs = self._send_frames()
        silent = [port for number, port in self._fronts.items() if number not in outputs]
        if silent and (now_s := self._core.progress.since_s) >= self._stats_s:
            self._stats_s = now_s + STATS_S
            self._tell_all(silent)

    def _send_frames(self) -> Outputs:
        outputs = self._core.take_outputs()
        if self._refused:
            for owner, frames in self._refused.items():
                outputs[owner] = [*frames, *outputs.get(owner, ())]
            self._refused = {}
        if outputs:
            began_s = self._core.clock.monotonic_s()
            snapshot = self._look()
            for owner, frames in outputs.items():
                port = self._fronts.get(owner)
                self._tracer.told(owner, frames)
                if port is not None:
                    port.send(Frames(frames=tuple(frames), snapshot=snapshot))
            if self._core.profile.on:
                self._core.profile.sent(outputs, began_s)
        return outputs

    def _answer_moves(self) -> None:
        """After the frames: a front that hears of the outcome has every token drawn before."""
        for owner, moved in self._core.mover.take_answers():
            port = self._fronts.get(owner)
            if port is not None:
                port.send(moved)
            if self._core.profile.on:
                self._core.profile.moved(moved)

    def _tell_all(self, ports: Iterable[Port]) -> None:
        stats = Stats(snapshot=self._look())
        for port in ports:
            port.send(stats)

    def _look(self) -> EngineSnapshot:
        counters = self._counters
        self.snapshot = self._core.snapshot(
            num_dropped_peers=counters.num_dropped, num_skipped_messages=counters.num_skipped
        )
        return self.snapshot

    # -- ends ---------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Accept nothing new. Fronts are told at once, so that they look for other places."""
        if self._drain_end_s is None:
            self._drain_end_s = self._core.clock.monotonic_s() + self._grace_s
            self._core.drain()
            self._tell_all(self._fronts.values())

    def _is_drained(self, end_s: float) -> bool:
        """What has not ended in time is left to the fronts, which go on with it elsewhere."""
        busy = self._core.has_requests or self._core.mover.has_pins
        return not busy or self._core.clock.monotonic_s() >= end_s

    def _let_go(self) -> None:
        """Close the connections of fronts that asked for it and have nothing running any more."""
        for number in tuple(self._leaving):
            if not self._core.scheduler.has_requests_of(number):
                self._leaving.discard(number)
                self._fronts[number].end()


_REFUSED = ErrorInfo(
    kind="InternalError", code="internal_error", message="the engine could not take the request"
)
