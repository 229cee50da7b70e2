"""Engine processes of this machine: started, refused, lost and ended; and LLM, AsyncLLM over them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from xllm import LLM, AsyncLLM, SamplingParams
from xllm.clock import SystemClock
from xllm.config import EngineConfig, FrontConfig, ModelConfig
from xllm.errors import AbortedError, ConfigError, RequestError, UnavailableError
from xllm.outputs import RequestOutput
from xllm.service.draft import RequestDraft
from xllm.service.instances import local, restart
from xllm.service.instances.local import LocalEngine
from xllm.service.local import LocalService
from xllm.testing.engine_process import DIED


@pytest.fixture(autouse=True)
def _sample_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PROGRAM", ("-m", "xllm.testing.engine_process"))
    monkeypatch.setattr(local, "EXIT_GRACE_S", 2.0)


def config(model: str) -> EngineConfig:
    return EngineConfig(model=ModelConfig(model=model))


async def start(*models: str, **front: float) -> LocalService:
    return await LocalService.start([config(m) for m in models], FrontConfig(**front), SystemClock())


async def test_an_engine_process_serves_and_ends_in_order() -> None:
    stages: list[str] = []
    service = await LocalService.start(
        [config("tiny")],
        FrontConfig(),
        SystemClock(),
        on_progress=lambda name, stage, _: stages.append(f"{name}: {stage}"),
    )
    draft = RequestDraft(model="tiny", prompt_token_ids=(70, 71), params=SamplingParams(max_tokens=40))
    stream = await service.front.submit(draft)
    tokens = tuple([t async for delta in stream for t in delta.token_ids])
    assert tokens == (70, 71) * 20
    assert stages == ["engine-0: nothing to load"]
    assert await service.close()
    assert service.engines[0].exit_code == 0


async def test_an_engine_that_refuses_to_load_raises_its_own_error() -> None:
    with pytest.raises(ConfigError, match="model='fail' fails"):
        await start("fail")


async def test_an_engine_that_dies_while_loading_is_unavailable_and_its_exit_code_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UnavailableError) as lost:
        await start("die")
    assert lost.value.code == "engine_lost"
    assert f"code {DIED}" in caplog.text


async def test_an_engine_that_never_answers_is_given_up() -> None:
    with pytest.raises(UnavailableError) as late:
        await LocalEngine.launch(config("hang"), timeout_s=0.2)
    assert late.value.code == "start_timeout"


async def test_a_killed_engine_is_started_again_under_its_name(caplog: pytest.LogCaptureFixture) -> None:
    up: asyncio.Queue[str] = asyncio.Queue()
    service = await LocalService.start(
        [config("tiny")], FrontConfig(), SystemClock(), on_up=lambda name, engine: up.put_nowait(name)
    )
    (killed,) = service.engines
    assert await up.get() == "engine-0"
    params = SamplingParams(max_tokens=1000)
    draft = RequestDraft(model="tiny", prompt_token_ids=(70, 71), params=params)
    stream = await service.front.submit(draft)
    deltas = aiter(stream)
    tokens = list((await anext(deltas)).token_ids)
    os.kill(killed.pid, signal.SIGKILL)
    assert await up.get() == "engine-0"
    assert killed.exit_code == -signal.SIGKILL
    assert f"code {-signal.SIGKILL}" in caplog.text
    assert service.engines[0].pid != killed.pid
    async for delta in deltas:
        tokens += delta.token_ids
    assert tokens == [70, 71] * 500
    (told,) = service.front.snapshot().instances
    assert (told.name, told.about.pid, told.about.num_restarts) == ("engine-0", service.engines[0].pid, 1)
    await service.close()


async def test_a_process_that_dies_at_every_start_is_never_added_until_it_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(restart, "DELAYS_S", (0.0, 0.01))
    up: asyncio.Queue[str] = asyncio.Queue()
    front_config = FrontConfig(recovery_grace_s=60.0)
    service = await LocalService.start(
        [config("tiny")], front_config, SystemClock(), on_up=lambda name, engine: up.put_nowait(name)
    )
    assert await up.get() == "engine-0"
    (slot,) = service.supervisor.slots
    slot.config = config("die")
    os.kill(service.engines[0].pid, signal.SIGKILL)
    while slot.restarts.num_deaths < 4:
        await asyncio.sleep(0.005)
    assert [i.state for i in service.front.snapshot().instances] == ["lost"]
    assert f"code {DIED}" in caplog.text
    assert up.empty()
    with pytest.raises(UnavailableError):
        await service.front.submit(
            RequestDraft(model="tiny", prompt_token_ids=(70,), params=SamplingParams(max_tokens=2))
        )
    slot.config = config("tiny")
    assert await up.get() == "engine-0"
    assert service.front.ready() == (True, "ready")
    await service.close()


async def test_a_cause_of_death_is_told_from_the_exit_status_and_a_stopped_process_from_its_state() -> None:
    engines = [await LocalEngine.launch(config("tiny")) for _ in range(3)]
    stopped, killed, crashed = engines
    os.kill(stopped.pid, signal.SIGSTOP)
    while not stopped.stopped():
        await asyncio.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    os.kill(crashed.pid, signal.SIGSEGV)
    assert [await engine.cause() for engine in engines] == ["stopped", "killed", "crash"]
    os.kill(stopped.pid, signal.SIGCONT)
    while stopped.stopped():
        await asyncio.sleep(0.001)
    stopped.kill()
    assert await stopped.cause() == "hang"
    for engine in engines:
        await engine.terminate()


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM("tiny") as made:
        yield made


def test_llm_answers_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6)
    outputs = llm.generate(["ab", {"prompt": "cd"}, {"prompt_token_ids": [70, 71]}], params, use_tqdm=False)
    ids = [o.prompt_token_ids for o in outputs]
    assert [o.prompt for o in outputs] == ["ab", "cd", None]
    assert ids[2] == [70, 71]
    for output in outputs:
        assert output.finished
        (choice,) = output.outputs
        assert choice.token_ids == (output.prompt_token_ids * 6)[:6]
        assert choice.finish_reason == "length"
        assert choice.logprobs is None


def test_llm_takes_parameters_and_priorities_per_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, n=2, stop=["zz"]) for n in (1, 2, 3)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=True, priority=[3, 2, 1])
    assert [[len(c.token_ids) for c in o.outputs] for o in outputs] == [[1, 1], [2, 2], [3, 3]]
    with pytest.raises(RequestError, match="3 entries for 1"):
        llm.generate("a", params)


def test_llm_chat_goes_through_the_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hi"}]
    one = llm.chat(talk, SamplingParams(max_tokens=1), use_tqdm=False)
    two = llm.chat([talk, talk], SamplingParams(max_tokens=1), use_tqdm=False)
    prompt = llm.get_tokenizer().decode(one[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [o.prompt_token_ids for o in two] == [one[0].prompt_token_ids] * 2


def test_llm_raises_for_bad_requests_and_goes_on(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(["ok", "bad"], [SamplingParams(), SamplingParams(temperature=-1.0)], use_tqdm=False)
    with pytest.raises(RequestError):
        llm.generate({"prompt_token_ids": [True]}, use_tqdm=False)
    with pytest.raises(RequestError):
        llm.generate("a", SamplingParams(max_tokens="7"), use_tqdm=False)  # type: ignore[arg-type]
    assert llm.generate([], use_tqdm=False) == []
    assert llm.generate("ok", use_tqdm=False)[0].finished


def test_llm_is_unusable_after_shutdown_and_names_unknown_arguments() -> None:
    llm = LLM("tiny")
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(UnavailableError):
        llm.generate("a")
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM("tiny", max_model_length=3)


def test_a_program_that_forgets_shutdown_ends_cleanly_with_its_engine() -> None:
    script = """
from xllm.service.instances import local, restart
local.PROGRAM = ("-m", "xllm.testing.engine_process")
from xllm import LLM, SamplingParams
llm = LLM("tiny")
llm.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)
print(llm._bench.service.engines[0].pid)
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


async def test_async_llm_streams_what_there_is_so_far() -> None:
    async with AsyncLLM("tiny") as llm:
        seen: list[RequestOutput] = [
            output async for output in llm.generate("abc", SamplingParams(max_tokens=5), "mine")
        ]
    assert [len(o.outputs[0].token_ids) for o in seen] == sorted(len(o.outputs[0].token_ids) for o in seen)
    assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]
    assert {o.request_id for o in seen} == {"mine"}


async def test_async_llm_aborts_by_name_and_by_leaving() -> None:
    async with AsyncLLM("tiny") as llm:
        params = SamplingParams(max_tokens=1000)
        left = llm.generate("abc", params)
        await anext(left)
        await left.aclose()
        named = llm.generate("abc", params, "mine")
        await anext(named)
        await llm.abort("mine")
        with pytest.raises(AbortedError):
            async for _ in named:
                pass
        assert llm.num_running == 0
