"""xLLM as a library: `AsyncLLM` in this process, its engine in its own, as users of the class have it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from xllm import AsyncLLM, SamplingParams


async def one(
    llm: AsyncLLM, run: dict[str, Any], index: int, gate: asyncio.Semaphore, origin: float
) -> dict[str, Any]:
    delay = run["at_s"][index] - (time.monotonic() - origin)
    if delay > 0:
        await asyncio.sleep(delay)
    params = SamplingParams(max_tokens=run["output_lens"][index], temperature=0.0, ignore_eos=True)
    async with gate:
        start = last = time.monotonic()
        first, gaps, last_output = 0.0, [], None
        async for output in llm.generate(run["prompts"][index], params):
            now, last_output = time.monotonic(), output
            if first:
                gaps.append(now - last)
            first, last = first or now, now
        end = time.monotonic()
    return {
        "start_s": start - origin,
        "ttft_s": first - start,
        "end_s": end - origin,
        "itls_s": gaps,
        "num_input_tokens": len(last_output.prompt_token_ids) if last_output else 0,
        "num_output_tokens": len(last_output.outputs[0].token_ids) if last_output else 0,
        "error": "" if last_output else "no output",
    }


async def serve(settings: dict[str, Any]) -> None:
    # The answer goes where stdout was; anything else that is printed goes to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    async with AsyncLLM(**settings) as llm:
        print(json.dumps({"ready": True}), file=answers, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            run = json.loads(line)
            gate, origin = asyncio.Semaphore(run["concurrency"]), time.monotonic()
            rows = await asyncio.gather(*(one(llm, run, i, gate, origin) for i in range(len(run["prompts"]))))
            print(json.dumps({"outcomes": rows}), file=answers, flush=True)


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
