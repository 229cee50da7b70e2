"""OpenVINO GenAI's continuous-batching pipeline, in its own environment: beside it only the standard library.

The loop is the documented one for serving: add requests as they come, step, read what is new.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import openvino_genai


def load(settings: dict[str, Any]) -> Any:
    scheduler = openvino_genai.SchedulerConfig()
    for name, value in settings["scheduler"].items():
        setattr(scheduler, name, value)
    return openvino_genai.ContinuousBatchingPipeline(
        settings["model"], scheduler, "CPU", settings["properties"]
    )


def config(output_len: int) -> Any:
    made = openvino_genai.GenerationConfig()
    made.max_new_tokens = output_len
    made.ignore_eos = True
    made.do_sample = False
    return made


def measure(pipeline: Any, run: dict[str, Any]) -> list[dict[str, Any]]:
    total, origin = len(run["prompts"]), time.monotonic()
    rows: list[dict[str, Any]] = []
    handles: dict[int, Any] = {}
    while (len(rows) < total or handles) and not hopeless(run, [r for r in rows if "error" in r]):
        while len(rows) < total and len(handles) < run["concurrency"]:
            index, now = len(rows), time.monotonic() - origin
            if run["at_s"][index] > now:
                break
            # Tokenising is part of the wait, as it is behind a server; so is, in an open loop, the step
            # that was under way when the request came.
            start_s = now if run["concurrency"] < total else run["at_s"][index]
            row: dict[str, Any] = {"start_s": start_s, "ttft_s": 0.0, "itls_s": [], "num_output_tokens": 0}
            rows.append(row)
            prompt = pipeline.get_tokenizer().encode(run["prompts"][index]).input_ids
            row["num_input_tokens"] = prompt.get_size()
            handles[index] = pipeline.add_request(index, prompt, config(run["output_lens"][index]))
        if not pipeline.has_non_finished_requests():
            time.sleep(min(0.001, max(0.0, run["at_s"][len(rows)] + origin - time.monotonic())))
            continue
        pipeline.step()
        for index in [index for index, handle in handles.items() if absorb(handle, rows[index], origin)]:
            del handles[index]
    for handle in handles.values():
        handle.cancel()
    while pipeline.has_non_finished_requests():
        pipeline.step()
    return [row for row in rows if "error" in row]


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


def absorb(handle: Any, row: dict[str, Any], origin: float) -> bool:
    """Take what is new; True when the request has ended."""
    now = time.monotonic() - origin
    while handle.can_read():
        new = sum(len(output.generated_ids) for output in handle.read().values())
        if not row["num_output_tokens"]:
            row["ttft_s"] = now - row["start_s"]
        else:
            row["itls_s"].append(now - row["end_s"])
        row["num_output_tokens"] += new
        row["end_s"] = now
    status = handle.get_status()
    if status == openvino_genai.GenerationStatus.RUNNING:
        return False
    row.setdefault("end_s", now)
    row["error"] = "" if status == openvino_genai.GenerationStatus.FINISHED else str(status)
    return True


def main() -> None:
    # The answer goes where stdout was; what the library prints goes to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    pipeline = load(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"outcomes": measure(pipeline, json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
