"""What LLM and AsyncLLM share: a running service with one model, prompts to drafts, streams to outputs.

Lives on one event loop; knows nothing of threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xllm.clock import SystemClock
from xllm.config import EngineConfig, FrontConfig
from xllm.errors import RequestError
from xllm.limits import typed_params
from xllm.outputs import OutputBuilder, RequestOutput
from xllm.service.draft import RequestDraft
from xllm.service.live import LiveRequest
from xllm.service.local import LocalService
from xllm.text.assets import TextAssets
from xllm.text.chat import encode_chat
from xllm.types import ModelCard, SamplingParams

log = logging.getLogger(__name__)

Prompt = str | Mapping[str, Any]
"""A text, {"prompt": text} or {"prompt_token_ids": ids}."""
Messages = Sequence[Mapping[str, Any]]

_DEFAULTS = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
"""What a model's generation config may set when the caller gives no SamplingParams."""


def default_sampling_params(card: ModelCard) -> SamplingParams:
    """SamplingParams with the model's own generation defaults."""
    return SamplingParams(**{k: v for k, v in card.generation_config.items() if k in _DEFAULTS})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Job:
    prompt: str | None
    draft: RequestDraft


class Workbench:
    """A running service with one model: what LLM and AsyncLLM share. Lives on one event loop."""

    def __init__(self, service: LocalService) -> None:
        self.service = service
        self.front = service.front
        (self.card,) = self.front.models()
        self.text: TextAssets = self.front.text(self.card.model_id)

    @classmethod
    async def open(cls, config: EngineConfig) -> Workbench:
        # Callers of this API queue on purpose; the engine's own limit is the only one that counts.
        front = FrontConfig(
            max_num_inflight_reqs=1 << 20,
            max_num_inflight_tokens=1 << 40,
            max_kv_oversubscription=float("inf"),
            max_queue_delay_s=0.0,
        )
        return cls(await LocalService.start([config], front, SystemClock(), on_progress=_log_progress))

    def job(self, prompt: Prompt, params: SamplingParams | None, priority: int = 0) -> Job:
        """Tokenise and check types. Raises RequestError."""
        text, ids = self._tokens(prompt)
        return self._job(text, ids, params, priority)

    def chat_job(self, messages: Messages, params: SamplingParams | None, **how: Any) -> Job:
        if self.text.template is None:
            raise RequestError("the model has no chat template; give one with chat_template=")
        ids = encode_chat(
            self.text.tokenizer, self.text.template, messages, max_tokens=self.card.max_model_len, **how
        )
        return self._job(None, tuple(ids), params, 0)

    async def submit(self, job: Job) -> tuple[LiveRequest, OutputBuilder]:
        stream = await self.front.submit(job.draft)
        builder = OutputBuilder(
            request_id=stream.request_id,
            prompt=job.prompt,
            prompt_token_ids=stream.prompt_token_ids,
            num_choices=job.draft.params.n,
            with_logprobs=job.draft.params.logprobs is not None,
            decode=lambda token: self.text.tokenizer.decode((token,), False, continuation=True),
        )
        return stream, builder

    async def run(self, job: Job) -> RequestOutput:
        stream, builder = await self.submit(job)
        async for delta in stream:
            builder.add(delta)
        return builder.output(stream.usage().cached_tokens)

    async def run_all(
        self, jobs: Sequence[Job], window: int, on_done: Callable[[RequestOutput], None]
    ) -> list[RequestOutput]:
        """Outputs in the order of the jobs, at most `window` in flight; the first error ends all."""
        results: dict[int, RequestOutput] = {}
        waiting = iter(enumerate(jobs))

        async def work() -> None:
            for index, job in waiting:
                results[index] = await self.run(job)
                on_done(results[index])

        workers = [asyncio.create_task(work()) for _ in range(min(window, len(jobs)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [results[index] for index in range(len(jobs))]

    def _job(
        self, text: str | None, ids: tuple[int, ...], params: SamplingParams | None, priority: int
    ) -> Job:
        checked = default_sampling_params(self.card) if params is None else typed_params(params)
        draft = RequestDraft(
            model=self.card.model_id, prompt_token_ids=ids, params=checked, priority=priority, cls="offline"
        )
        return Job(text, draft)

    def _tokens(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            ids = tuple(prompt["prompt_token_ids"])
            if not all(type(i) is int for i in ids):
                raise RequestError("prompt_token_ids must hold integers", code="invalid_type", param="prompt")
            return prompt.get("prompt"), ids
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if not isinstance(text, str):
            message = 'a prompt is a string, {"prompt": string} or {"prompt_token_ids": [int, ...]}'
            raise RequestError(message, code="invalid_type", param="prompt")
        return text, tuple(self.text.tokenizer.encode(text, max_tokens=self.card.max_model_len))


def _log_progress(name: str, stage: str, elapsed_s: float) -> None:
    log.info("%s: %s (%.1f s)", name, stage, elapsed_s)
