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
        # In an open loop this loop's own lag is part of the wait.
        is_open = run["concurrency"] >= len(run["prompts"])
        start = last = origin + run["at_s"][index] if is_open else time.monotonic()
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


async def while_hopeful(
    run: dict[str, Any], tasks: list[asyncio.Task[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Rows in order; with limits, only those that had ended when the run became hopeless."""
    left = set(tasks)
    while left:
        _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        if hopeless(run, [task.result() for task in tasks if task.done()]):
            break
    ended = [task.result() for task in tasks if task.done()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    return ended


def hopeless(run: dict[str, Any], ended: list[dict[str, Any]]) -> bool:
    """Whether too many of the rows that ended are over a limit; without limits never."""
    if "hopeless" not in run:
        return False
    late = sum(row["ttft_s"] > run["max_ttft_s"] for row in ended)
    slow = sum(
        row["end_s"] - row["start_s"] - row["ttft_s"] > run["max_tpot_s"] * (row["num_output_tokens"] - 1)
        for row in ended
    )
    return bool(max(late, slow) >= run["hopeless"])


async def serve(settings: dict[str, Any]) -> None:
    # The answer goes where stdout was; anything else that is printed goes to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    async with AsyncLLM(**settings) as llm:
        print(json.dumps({"ready": True}), file=answers, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            run = json.loads(line)
            gate, origin = asyncio.Semaphore(run["concurrency"]), time.monotonic()
            tasks = [asyncio.create_task(one(llm, run, i, gate, origin)) for i in range(len(run["prompts"]))]
            rows = await while_hopeful(run, tasks)
            print(json.dumps({"outcomes": rows}), file=answers, flush=True)


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
