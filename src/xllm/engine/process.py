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
from dataclasses import replace

from xllm.clock import SystemClock
from xllm.engine.build import BuiltEngine, build_engine
from xllm.engine.connection import Connection
from xllm.engine.loop import EngineLoop
from xllm.engine.platform.host import bind_to_cpus
from xllm.engine.surviving import SharedPages
from xllm.errors import ErrorInfo, XllmError
from xllm.heap import settle
from xllm.ids import new_request_id
from xllm.wire.messages import WIRE_VERSION, Hello, Progress, Ready, Start, StartFailed

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_OLDEST_VERSION = WIRE_VERSION - 1


def main(argv: list[str] | None = None) -> int:
    """Serve one front until it is gone; 0 = ended in order, 1 = could not start."""
    parser = argparse.ArgumentParser(prog="xllm-engine")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the front")
    parser.add_argument("--pages-fd", type=int, help="inherited memory for KV pages that outlive us")
    parser.add_argument("--log-level", default="warning")
    args = parser.parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), stream=sys.stderr)
    _die_with_parent()
    # Ctrl-C goes to the whole process group; the front decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    connection = Connection(socket.socket(fileno=args.fd))
    try:
        return _serve(connection, args.pages_fd)
    finally:
        connection.close()


def _serve(connection: Connection, pages_fd: int | None) -> int:
    connection.send(Hello(incarnation=new_request_id()))
    hello, start = connection.inbox.get(), connection.inbox.get()
    if not isinstance(hello, Hello) or not isinstance(start, Start):
        return 1
    if not _OLDEST_VERSION <= hello.version <= WIRE_VERSION + 1:
        _refuse(
            connection, f"wire version {hello.version} is not understood; this engine speaks {WIRE_VERSION}"
        )
        return 1
    engine = _build(connection, start, pages_fd)
    if engine is None:
        return 1
    settle()
    connection.send(Ready(card=engine.core.card, pid=os.getpid(), report=engine.report))
    try:
        EngineLoop(engine.core, engine.assets, connection.inbox, connection.send).run()
    finally:
        engine.core.close()
    return 0


def _build(connection: Connection, start: Start, pages_fd: int | None) -> BuiltEngine | None:
    def progress(stage: str, elapsed_s: float) -> None:
        connection.send(Progress(stage=stage, elapsed_s=elapsed_s))

    def early(assets: Mapping[str, bytes]) -> None:
        connection.send(Progress(stage="text assets made", assets=dict(assets)))

    try:
        # First: whatever is started and counted from here on knows these CPUs only.
        bound = bind_to_cpus(start.config.platform.cpus)
        shared = None if pages_fd is None else SharedPages(pages_fd)
        engine = build_engine(start.config, SystemClock(), progress, early, shared)
        return engine if bound is None else replace(engine, report=(bound, *engine.report))
    except XllmError as error:
        connection.send(StartFailed(error=error.info()))
    except Exception:
        log.exception("the engine could not start")
        _refuse(connection, "the engine could not start; its log says why")
    return None


def _refuse(connection: Connection, message: str) -> None:
    connection.send(StartFailed(error=ErrorInfo(kind="ConfigError", code="start_failed", message=message)))


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
