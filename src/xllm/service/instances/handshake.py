"""The front's half of getting an engine over a stream: Hello, Start, progress, Ready; or Attach, Ready.

Knows nothing of processes; the same for an engine in memory, on a socket pair or far away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from xllm.config import EngineConfig
from xllm.errors import ConfigError, UnavailableError
from xllm.wire.codec import WireError
from xllm.wire.hello import FRONT, NEWEST_VERSION, OLDEST_VERSION
from xllm.wire.messages import WIRE_VERSION, Attach, Hello, Progress, Ready, Start, StartFailed
from xllm.wire.stream import EngineStream

OnProgress = Callable[[str, float], None]
"""Called with (stage that has just ended, seconds it took)."""

OnAssets = Callable[[dict[str, bytes]], None]
"""Called with an engine's text assets by name, if it sends them before it has loaded."""

ATTACH_S = 5.0


def ignore_progress(stage: str, elapsed_s: float) -> None:
    """For callers that show nothing."""


def ignore_assets(assets: dict[str, bytes]) -> None:
    """For callers that fetch them by digest in due time."""


async def start_engine(
    stream: EngineStream,
    config: EngineConfig,
    *,
    timeout_s: float,
    on_progress: OnProgress = ignore_progress,
    on_assets: OnAssets = ignore_assets,
    peer_key: bytes = b"",
) -> Ready:
    """Make the peer become the engine of `config` and wait until it has loaded.

    Raises the engine's own error if it reports one (ConfigError as a rule), UnavailableError if it
    dies or takes longer than `timeout_s`. The stream is left open.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await stream.send(Hello(role=FRONT))
            await stream.send(Start(config=config, peer_key=peer_key))
            return await _wait_ready(stream, on_progress, on_assets)
    except TimeoutError as error:
        message = f"the engine did not load within {timeout_s:g} s; see start_timeout_s"
        raise UnavailableError(message, code="start_timeout") from error
    except (ConnectionError, WireError) as error:
        raise UnavailableError("the engine was lost while it loaded", code="engine_lost") from error


async def attach(stream: EngineStream, *, timeout_s: float = ATTACH_S) -> Ready:
    """Join an engine that has loaded already, over a stream of `wire.stream.connect_tcp`.

    Raises UnavailableError when it does not answer in time or is lost. The stream is left open.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await stream.send(Attach())
            return await _wait_ready(stream, ignore_progress, ignore_assets)
    except TimeoutError as error:
        message = f"the engine did not answer within {timeout_s:g} s"
        raise UnavailableError(message, code="attach_timeout") from error
    except (ConnectionError, WireError) as error:
        raise UnavailableError("the engine was lost", code="engine_lost") from error


async def _wait_ready(stream: EngineStream, on_progress: OnProgress, on_assets: OnAssets) -> Ready:
    while (message := await stream.receive()) is not None:
        if isinstance(message, Ready):
            return message
        if isinstance(message, StartFailed):
            raise message.error.to_error()
        if isinstance(message, Progress):
            if message.assets:
                on_assets(message.assets)
            else:
                on_progress(message.stage, message.elapsed_s)
        if isinstance(message, Hello) and not OLDEST_VERSION <= message.version <= NEWEST_VERSION:
            raise ConfigError(
                f"the engine speaks wire version {message.version}, this front {WIRE_VERSION}",
                code="wire_version",
            )
    raise UnavailableError("the engine ended while it loaded; its log says why", code="engine_lost")
