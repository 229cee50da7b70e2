"""The engine process: `python -m xllm.engine.process --fd N`, started by a front over a socket pair.

Hand-shake, loading with progress, then `loop`. It dies with its front (PDEATHSIG and EOF). Nothing
about scheduling or maths may live here.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping

import msgspec

from xllm.clock import SystemClock
from xllm.engine.build import BuiltEngine, build_here, join_peers, ready_of
from xllm.engine.hub import Hub
from xllm.engine.kvtransfer.opening import peer_identity
from xllm.engine.loop import EngineLoop
from xllm.engine.moving.news import TransferNews
from xllm.engine.session import Session
from xllm.engine.time_slice import ask_long_slice
from xllm.engine.tracing import RequestTracer
from xllm.errors import ErrorInfo, XllmError
from xllm.heap import settle
from xllm.ids import new_request_id
from xllm.observability.logs import setup_logging
from xllm.wire.hello import INSTANCE, NEWEST_VERSION, OLDEST_VERSION
from xllm.wire.messages import WIRE_VERSION, Hello, Progress, Start, StartFailed

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    """Serve one front until it is gone; 0 = ended in order, 1 = could not start."""
    parser = argparse.ArgumentParser(prog="xllm-engine")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the front")
    parser.add_argument("--pages-fd", type=int, help="inherited memory for KV pages that outlive us")
    parser.add_argument("--log-level", default="warning")
    args = parser.parse_args(argv)
    setup_logging(args.log_level)
    _die_with_parent()
    # Ctrl-C goes to the whole process group; the front decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hub = Hub(None, SystemClock())
    session = hub.adopt(socket.socket(fileno=args.fd))
    hub.start()
    ask_long_slice()  # the I/O thread has started and keeps the usual one: it answers fronts
    try:
        return _serve(hub, session, args.pages_fd, args.log_level)
    finally:
        hub.close()


def _serve(hub: Hub, session: Session, pages_fd: int | None, log_level: str) -> int:
    incarnation = new_request_id()
    session.send(Hello(incarnation=incarnation, role=INSTANCE))
    (_, hello), (_, start) = hub.inbox.get(), hub.inbox.get()
    if not isinstance(hello, Hello) or not isinstance(start, Start):
        return 1
    if not OLDEST_VERSION <= hello.version <= NEWEST_VERSION:
        _refuse(session, f"wire version {hello.version} is not understood; this engine speaks {WIRE_VERSION}")
        return 1
    session.version = min(hello.version, WIRE_VERSION)
    setup_logging(log_level, as_json=start.config.observability.log_format == "json")
    engine = _build(session, start, pages_fd)
    if engine is None:
        return 1
    tracer = RequestTracer.for_config(start.config)
    settle()
    plane, news = None, TransferNews(engine.core, hub.inbox)
    try:
        if start.peer_key:  # without one anybody could bring pages
            identity = peer_identity(start.peer_key, incarnation)
            plane = join_peers(engine, start.config, identity, news)
    except XllmError as error:
        session.send(StartFailed(error=error.info()))
        return 1
    endpoints = () if plane is None else plane.endpoints
    ready = msgspec.structs.replace(ready_of(engine, start.config, endpoints), incarnation=incarnation)
    session.send(ready)
    hub.tell_progress(engine.core.progress)
    try:
        EngineLoop(
            engine.core,
            engine.assets,
            hub.inbox,
            ready,
            parent=session,
            counters=hub.counters,
            tracer=tracer,
            news=news,
        ).run()
    finally:
        if plane is not None:
            plane.close()
        engine.core.close()
        tracer.close()
    return 0


def _build(session: Session, start: Start, pages_fd: int | None) -> BuiltEngine | None:
    def progress(stage: str, elapsed_s: float) -> None:
        session.send(Progress(stage=stage, elapsed_s=elapsed_s))

    def early(assets: Mapping[str, bytes]) -> None:
        session.send(Progress(stage="text assets made", assets=dict(assets)))

    try:
        return build_here(start.config, progress, early, pages_fd)
    except XllmError as error:
        session.send(StartFailed(error=error.info()))
    except Exception:
        log.exception("the engine could not start")
        _refuse(session, "the engine could not start; its log says why")
    return None


def _refuse(session: Session, message: str) -> None:
    session.send(StartFailed(error=ErrorInfo(kind="ConfigError", code="start_failed", message=message)))


def _die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the front dies, so that no engine is ever orphaned."""
    if sys.platform != "linux":
        return  # elsewhere EOF on the socket ends the loop
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call took effect
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
