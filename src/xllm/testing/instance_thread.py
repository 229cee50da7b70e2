"""A listening engine on the null device in this process: real sockets, hand-shakes, scheduler and memory.

For tests of what connects to instances. `stop` at the end; the port is one the kernel chose.
"""

from __future__ import annotations

from collections.abc import Mapping

from xllm.clock import SystemClock
from xllm.config import ClusterConfig, EngineConfig
from xllm.engine.build import BuiltEngine
from xllm.engine.link import LinkLimits
from xllm.engine.server import InstanceServer
from xllm.testing.null_engine import NullEngine, null_engine
from xllm.wire.hello import Identity


def null_instance(
    engine: NullEngine | None = None,
    *,
    cluster: ClusterConfig | None = None,
    identity: Identity | None = None,
    limits: LinkLimits | None = None,
    grace_s: float = 30.0,
    assets: Mapping[str, bytes] | None = None,
) -> InstanceServer:
    """An instance over `engine`, started. `assets` maps digest → bytes."""
    engine = engine or null_engine()
    # Deadlines are real here, and pulses are told by the same clock that made them.
    engine.core.clock = SystemClock()
    built = BuiltEngine(
        core=engine.core, runner=engine.runner, memory=engine.memory, assets=assets or {}, report=("null",)
    )
    server = InstanceServer(
        built,
        EngineConfig(),
        cluster or ClusterConfig(),
        identity=identity,
        limits=limits,
        grace_s=grace_s,
    )
    server.start()
    return server
