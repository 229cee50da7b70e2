"""An engine that listens: any number of fronts at once, and it outlives each of them.

Owns the step thread and the I/O thread of a loaded engine. Who is told the address (a registry), and which
signals mean what, is the composer's matter.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading

import msgspec

from xllm.clock import SystemClock
from xllm.config import ClusterConfig, EngineConfig
from xllm.config.instances import ROLES, phases_in_order
from xllm.engine.build import BuiltEngine, join_peers, ready_of
from xllm.engine.hub import Hub
from xllm.engine.link import LinkCounters, LinkLimits
from xllm.engine.loop import EngineLoop
from xllm.engine.moving.news import TransferNews
from xllm.engine.time_slice import ask_long_slice
from xllm.engine.tracing import RequestTracer
from xllm.errors import ConfigError
from xllm.types import EngineSnapshot
from xllm.wire.hello import INSTANCE, Identity, listen_address
from xllm.wire.messages import Drain, Ready

log = logging.getLogger(__name__)

BACKLOG = 64


class InstanceServer:
    """`start`, then `wait`. `drain` and `stop` may be called from any thread and from a signal handler.

    `identity.peer_id` and `identity.incarnation` are what fronts see in Hello: a registry entry must
    carry the same ones. `address` is where it listens, the port filled in.
    """

    def __init__(
        self,
        engine: BuiltEngine,
        config: EngineConfig,
        cluster: ClusterConfig,
        *,
        identity: Identity | None = None,
        grace_s: float = 30.0,
        limits: LinkLimits | None = None,
    ) -> None:
        """Binds the address; nobody is let in before `start`. Raises ConfigError."""
        self.identity = identity or Identity.of(cluster, INSTANCE)
        # A label: this engine computes whatever it is given, and fronts may call it something else later.
        phases = phases_in_order(ROLES[cluster.role])
        listener = _bind(*listen_address(cluster, self.identity.key))
        host, port = listener.getsockname()[:2]
        self.address: tuple[str, int] = (host, port)
        self._engine = engine
        self._hub = Hub(engine.core.progress, SystemClock(), limits)
        self._hub.listen(listener, self.identity)
        news = TransferNews(engine.core, self._hub.inbox)
        self._plane = join_peers(engine, config, self.identity, news)
        endpoints = () if self._plane is None else self._plane.endpoints
        self.ready: Ready = msgspec.structs.replace(ready_of(engine, config, endpoints), phases=phases)
        self._tracer = RequestTracer.for_config(config, self.identity.peer_id)
        self._loop = EngineLoop(
            engine.core,
            engine.assets,
            self._hub.inbox,
            self.ready,
            grace_s=grace_s,
            counters=self.counters,
            tracer=self._tracer,
            news=news,
        )
        self._ended = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    def start(self) -> None:
        self._hub.start()
        self._thread.start()

    @property
    def counters(self) -> LinkCounters:
        """Of connections, in particular of those that were dropped and why."""
        return self._hub.counters

    @property
    def snapshot(self) -> EngineSnapshot:
        """The last one that fronts were told."""
        return self._loop.snapshot

    def drain(self) -> None:
        """Tell all fronts, accept nothing new, end when nothing runs or `grace_s` has passed."""
        self._hub.inbox.put((None, Drain()))

    def stop(self) -> None:
        """End after the step that runs. Fronts see closed connections: the instance is lost to them."""
        self._hub.inbox.put((None, None))

    def wait(self, timeout_s: float | None = None) -> int | None:
        """0 = ended in order, 1 = the step thread failed, None = it still runs."""
        if not self._ended.wait(timeout_s):
            return None
        return int(self._failed)

    def _run(self) -> None:
        ask_long_slice()
        try:
            self._loop.run()
        except Exception:
            log.exception("the step thread failed; the engine ends")
            self._failed = True
        finally:
            self._hub.close()
            if self._plane is not None:
                self._plane.close()
            self._engine.core.close()
            self._tracer.close()
            self._ended.set()


def obey_signals(server: InstanceServer) -> None:
    """SIGTERM or SIGINT: drain; again: stop after the running step; once more: die. SIGHUP is ignored.

    For the main thread of a process that is this instance and nothing else.
    """
    calls = [server.drain, server.stop]

    def handle(number: int, frame: object) -> None:
        calls.pop(0)()
        if not calls:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"listen={host}:{port}: cannot listen there ({error.strerror}); choose another address or port 0",
            param="listen",
        ) from error
