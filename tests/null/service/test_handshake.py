"""Starting an engine over a stream: versions, progress, refusals."""

from __future__ import annotations

import asyncio

import pytest

from xllm.config import EngineConfig
from xllm.errors import CapacityError, ConfigError, ErrorInfo, UnavailableError
from xllm.service.instances.handshake import start_engine
from xllm.testing.fake_engine import sample_card
from xllm.testing.memory_stream import memory_pair
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.wire.messages import WIRE_VERSION, EngineMessage, Hello, Progress, Ready, Start, StartFailed

CARD = sample_card(tiny_assets())


async def shake(*answers: EngineMessage, end: bool = False, timeout_s: float = 30.0) -> Ready:
    stream, engine = memory_pair()
    starting = asyncio.create_task(start_engine(stream, EngineConfig(), timeout_s=timeout_s))
    assert isinstance(await engine.receive(), Hello)
    assert isinstance(await engine.receive(), Start)
    for answer in answers:
        engine.send(answer)
    if end:
        engine.close()
    return await starting


@pytest.mark.parametrize("version", [WIRE_VERSION - 1, WIRE_VERSION, WIRE_VERSION + 1])
async def test_neighbouring_versions_talk(version: int) -> None:
    ready = await shake(Hello(version=version), Progress(stage="x"), Ready(card=CARD, pid=1))
    assert ready.card == CARD


@pytest.mark.parametrize("version", [WIRE_VERSION - 2, WIRE_VERSION + 2])
async def test_other_versions_are_refused_by_number(version: int) -> None:
    with pytest.raises(ConfigError, match=str(version)):
        await shake(Hello(version=version), Ready(card=CARD, pid=1))


async def test_the_engines_own_error_arrives_with_its_class() -> None:
    info = ErrorInfo(kind="CapacityError", code="no_memory", message="too big", retry_after_s=3.0)
    with pytest.raises(CapacityError) as failed:
        await shake(Hello(), StartFailed(error=info))
    assert (failed.value.code, failed.value.retry_after_s) == ("no_memory", 3.0)


async def test_silence_and_death_are_unavailable() -> None:
    with pytest.raises(UnavailableError) as late:
        await shake(Hello(), timeout_s=0.01)
    assert late.value.code == "start_timeout"
    with pytest.raises(UnavailableError) as lost:
        await shake(Hello(), end=True)
    assert lost.value.code == "engine_lost"


async def test_assets_that_come_early_are_handed_on_and_are_no_stage() -> None:
    stream, engine = memory_pair()
    stages: list[str] = []
    found: list[dict[str, bytes]] = []
    starting = asyncio.create_task(
        start_engine(
            stream,
            EngineConfig(),
            timeout_s=30.0,
            on_progress=lambda stage, _: stages.append(stage),
            on_assets=found.append,
        )
    )
    for message in (
        Hello(),
        Progress(stage="text", assets=tiny_assets()),
        Progress(stage="weights"),
        Ready(card=CARD, pid=1),
    ):
        engine.send(message)
    assert (await starting).card == CARD
    assert (stages, found) == (["weights"], [tiny_assets()])
