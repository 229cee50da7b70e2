"""`AsyncLLM`: outputs as they grow, on the caller's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from xllm.config import EngineConfig
from xllm.config.load import from_keywords
from xllm.errors import RequestError, UnavailableError
from xllm.ids import new_request_id
from xllm.llm.workbench import Prompt, Workbench
from xllm.outputs import RequestOutput
from xllm.service.live import LiveRequest
from xllm.types import SamplingParams


class AsyncLLM:
    """A model in an asyncio program. Use `async with`, or `start` and `shutdown`, on one loop.

    Leaving the iteration of `generate`, or cancelling its task, aborts the request in the engine.
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        """Check the arguments; `start` loads. Raises ConfigError."""
        self._config = from_keywords(EngineConfig, {"model": model, **engine_args})
        self._opening = asyncio.Lock()
        self._bench: Workbench | None = None
        self._closed = False
        self._running: dict[str, LiveRequest] = {}

    async def start(self) -> None:
        """Load the model; idempotent. The first `generate` does it otherwise."""
        await self._open_bench()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """The output so far, each time some is new; the last one is `finished`.

        `request_id` is the caller's name for `abort`. Raises RequestError when it is in use.
        """
        bench = await self._open_bench()
        job = await asyncio.to_thread(bench.job, prompt, sampling_params, priority)
        name = request_id if request_id is not None else new_request_id()
        if name in self._running:
            raise RequestError("the request_id is in use", param="request_id")
        stream, builder = await bench.submit(job)
        self._running[name] = stream
        try:
            async for delta in stream:
                builder.add(delta)
                output = builder.output(stream.usage().cached_tokens)
                output.request_id = name
                yield output
        finally:
            # The generator may be closed between two deltas, where the stream's own is not running.
            await stream.aclose()
            del self._running[name]

    async def abort(self, request_id: str) -> None:
        """End the request of that name; its iteration raises AbortedError. Unknown names are ignored."""
        stream = self._running.get(request_id)
        if stream is not None and self._bench is not None:
            await self._bench.front.abort(stream.request_id)

    @property
    def num_running(self) -> int:
        """Requests that are being iterated."""
        return len(self._running)

    async def shutdown(self) -> None:
        """End the engine process; idempotent."""
        self._closed = True
        async with self._opening:
            bench, self._bench = self._bench, None
        if bench is not None:
            await bench.service.close()

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()

    async def _open_bench(self) -> Workbench:
        async with self._opening:
            if self._closed:
                raise UnavailableError("this AsyncLLM has been shut down")
            if self._bench is None:
                self._bench = await Workbench.open(self._config)
            return self._bench
