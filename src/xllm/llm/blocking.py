"""`LLM`: prompts in, finished outputs out, on the caller's thread."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xllm.config import EngineConfig
from xllm.config.load import from_keywords
from xllm.errors import RequestError, UnavailableError
from xllm.llm.loop_thread import LoopThread
from xllm.llm.progress_bar import ProgressBar
from xllm.llm.workbench import Job, Messages, Prompt, Workbench, default_sampling_params
from xllm.outputs import RequestOutput
from xllm.text.tokenizer import Tokenizer
from xllm.types import ModelCard, SamplingParams


class LLM:
    """A model in this program. Blocking; safe to call from one thread at a time.

    `engine_args` are the fields of EngineConfig's parts (dtype, max_model_len, max_num_seqs,
    enable_prefix_caching, seed, served_model_name, …). End it with `shutdown`, `with`, or the
    program's exit: it owns an engine process.
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        """Load the model. Raises ConfigError for arguments that are unknown or cannot work."""
        self._config = from_keywords(EngineConfig, {"model": model, **engine_args})
        self._loop = LoopThread()
        try:
            self._bench: Workbench | None = self._loop.run(Workbench.open(self._config))
        except BaseException:
            self._loop.stop()
            raise
        atexit.register(_shutdown_at_exit, weakref.ref(self))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One output per prompt, in order. Lists of parameters and priorities go prompt by prompt.

        Raises the first error of any request; the others are aborted then.
        """
        bench = self._open_bench()
        items = _as_list(prompts, (str, Mapping))
        params = _spread(sampling_params, len(items), "sampling_params")
        order = _spread(None if priority is None else list(priority), len(items), "priority")
        jobs = [bench.job(p, sp, rank or 0) for p, sp, rank in zip(items, params, order, strict=True)]
        return self._run(bench, jobs, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate` for one conversation or a list of them, through the model's template."""
        bench = self._open_bench()
        single = bool(messages) and isinstance(messages[0], Mapping)
        talks: list[Any] = [messages] if single else list(messages)
        params = _spread(sampling_params, len(talks), "sampling_params")
        how = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        jobs = [bench.chat_job(talk, sp, **how) for talk, sp in zip(talks, params, strict=True)]
        return self._run(bench, jobs, use_tqdm)

    @property
    def card(self) -> ModelCard:
        """What the engine tells about the model."""
        return self._open_bench().card

    def get_tokenizer(self) -> Tokenizer:
        return self._open_bench().text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return default_sampling_params(self.card)

    def shutdown(self) -> None:
        """End the engine process; idempotent. Requests of other threads end with UnavailableError."""
        bench, self._bench = self._bench, None
        if bench is not None:
            self._loop.run(bench.service.close())
            self._loop.stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def _open_bench(self) -> Workbench:
        if self._bench is None:
            raise UnavailableError("this LLM has been shut down")
        return self._bench

    def _run(self, bench: Workbench, jobs: list[Job], use_tqdm: bool) -> list[RequestOutput]:
        if not jobs:
            return []
        scheduler = self._config.scheduler
        widest = max(job.draft.params.n for job in jobs)
        window = scheduler.max_num_queued_reqs + max(1, scheduler.max_num_seqs // widest)
        with ProgressBar(len(jobs), enabled=use_tqdm) as progress:
            return self._loop.run(bench.run_all(jobs, window, progress.done))


def _shutdown_at_exit(ref: weakref.ref[LLM]) -> None:
    llm = ref()
    if llm is not None:
        llm.shutdown()


def _as_list(value: Any, single: tuple[type, ...]) -> list[Any]:
    return [value] if isinstance(value, single) or not isinstance(value, Iterable) else list(value)


def _spread(value: Any, count: int, name: str) -> list[Any]:
    """One entry per prompt out of a single value or a list of `count`."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts", param=name)
    return list(value)
