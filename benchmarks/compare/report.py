"""From the turns to the table: medians over rounds, their spread, ratios paired by round. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.compare import goodput
from benchmarks.compare.load import Load
from benchmarks.compare.rounds import Result

MIN_ROUNDS = 3
MAX_STRANGERS_CORES = 0.1

Ceilings = Mapping[str, Any]
"""What `benchmarks.native_step` found; {} when it did not run."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest over the rounds."""

    mid: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.mid:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


COLUMNS = (
    "engine",
    "tokens/s",
    "TTFT p50 / p99 ms",
    "TPOT p50 / p99 ms",
    "xllm ÷ this",
    "of ceiling",
    "failed",
)


def rows(results: Sequence[Result], load: Load, ceilings: Ceilings) -> list[tuple[str, ...]]:
    """One row per entry; entries without a result say why instead."""
    made: list[tuple[str, ...]] = []
    for result in results:
        turns = result.turns.get(load.name, [])
        if not turns:
            made.append(
                (result.entry.name, "missing" if result.problem else "left out", *[""] * (len(COLUMNS) - 2))
            )
            continue
        speed = Spread.of(column(turns, load.speed_key))
        made.append(
            (
                result.entry.name,
                speed.text(1),
                _pair(turns, "ttft"),
                _pair(turns, "tpot"),
                ratio(results, result, load),
                _of_ceiling(result, load, speed.mid, turns, ceilings),
                str(sum(turn["failed"] for turn in turns)),
            )
        )
    return made


def best(results: Sequence[Result], load: Load) -> list[str]:
    """Our fastest over HTTP against the fastest peer of any class and way; empty when a side lacks."""
    speeds = {
        result.entry: median(column(turns, load.speed_key))
        for result in results
        if (turns := result.turns.get(load.name))
    }
    ours = {e: v for e, v in speeds.items() if e.engine == "xllm" and e.transport == "http"}
    theirs = {e: v for e, v in speeds.items() if e.engine != "xllm"}
    if not ours or not theirs:
        return []
    one, other = max(ours, key=lambda e: ours[e]), max(theirs, key=lambda e: theirs[e])
    times = f"{ours[one] / theirs[other]:.2f}" if theirs[other] else "–"
    return [f"Best of any class: {one.name} ÷ {other.name} = {times}", ""]


def column(turns: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(turn[key]) for turn in turns]


def _pair(turns: Sequence[Mapping[str, Any]], name: str) -> str:
    return " / ".join(f"{median(column(turns, f'{p}_{name}_ms')):.1f}" for p in ("p50", "p99"))


def ratio(results: Sequence[Result], result: Result, load: Load) -> str:
    """xLLM's output tokens/s over this one's, same weights and transport, paired by round."""
    entry = result.entry
    ours = [
        other.turns.get(load.name, [])
        for other in results
        if other.entry.engine == "xllm"
        and (other.entry.weights, other.entry.transport) == (entry.weights, entry.transport)
    ]
    if entry.engine == "xllm" or not ours or not ours[0]:
        return "–"
    key = load.speed_key
    theirs = {turn["round"]: turn[key] for turn in result.turns[load.name]}
    paired = [turn[key] / theirs[turn["round"]] for turn in ours[0] if theirs.get(turn["round"], 0.0) > 0.0]
    return Spread.of(paired).text(2) if paired else "–"


def _of_ceiling(
    result: Result, load: Load, speed: float, turns: Sequence[Mapping[str, Any]], ceilings: Ceilings
) -> str:
    """Fraction of the native step's own speed: prefill, or out ÷ (in ÷ prefill + out ÷ decode)."""
    found = ceilings.get("classes", {}).get(result.entry.weights)
    done = max(1, turns[0]["completed"])
    num_in, num_out = turns[0]["total_input_tokens"] / done, turns[0]["total_output_tokens"] / done
    if not found:
        return "–"
    if load.is_prefill:
        known = found["prefill"].get(f"{load.concurrency}x{load.input_len}")
        return f"{speed / known:.2f}" if known else "–"
    decode = found["decode"].get(str(load.concurrency))
    if not decode or not num_out:
        return "–"
    ceiling = num_out / (num_in / max(found["prefill"].values()) + num_out / decode)
    return f"{speed / ceiling:.2f}"


def single_stream(results: Sequence[Result], loads: Sequence[Load], ceilings: Ceilings) -> list[str]:
    """One user's decode speed against reading the weights once a token at the measured bandwidth."""
    read_s = max(
        (rate["best"] for rate in ceilings.get("peaks", {}).get("read_gb_s", {}).values()), default=0.0
    )
    lines: list[str] = []
    for load in loads:
        for result in results if load.concurrency == 1 and not load.is_prefill and read_s else ():
            found = ceilings["classes"].get(result.entry.weights)
            turns = result.turns.get(load.name, [])
            if found and turns:
                per_s = 1e3 / median(column(turns, "p50_tpot_ms"))
                limit = read_s * 1e9 / found["weight_bytes"]
                lines.append(
                    f"* {result.entry.name}: {per_s:.0f} tokens/s of {limit:.0f}, {per_s / limit:.0%} "
                    f"({load.input_len} in / {load.output_len} out)"
                )
    return ["## One stream against weight bytes ÷ measured read bandwidth", "", *lines, ""] if lines else []


def warnings(results: Sequence[Result], num_rounds: int) -> list[str]:
    """What a reader must know before quoting a number."""
    found = []
    missing = [result for result in results if result.problem]
    if missing:
        found.append(f"INCOMPLETE: {len(missing)} of {len(results)} entries gave no result")
        found += [f"{result.entry.name}: {result.problem.splitlines()[0][:200]}" for result in missing]
    if num_rounds < MIN_ROUNDS:
        found.append(f"PROVISIONAL: {num_rounds} round(s); a result needs {MIN_ROUNDS} or more")
    turns = [turn for result in results for of_load in result.turns.values() for turn in of_load]
    strangers = max((turn["strangers_cores"] for turn in turns), default=0.0)
    if strangers > MAX_STRANGERS_CORES:
        found.append(f"NOT QUIET: other programs took up to {strangers:.2f} cores during a turn")
    idle = max((turn["idle_engines_cores"] for turn in turns), default=0.0)
    if idle > MAX_STRANGERS_CORES:
        found.append(f"engines that were not measured took up to {idle:.2f} cores during a turn")
    if any(turn["failed"] for turn in turns):
        found.append("some requests failed; tokens/s counts the others only")
    found += _uneven(results)
    return found


def _uneven(results: Sequence[Result]) -> list[str]:
    """Engines must have done the same work: same prompts in tokens, same number of answers' tokens."""
    found = []
    for key, what in (("total_input_tokens", "prompt"), ("total_output_tokens", "output")):
        for load in sorted({name for result in results for name in result.turns}):
            counts = {r.entry.name: r.turns[load][0][key] for r in results if r.turns.get(load)}
            if len(set(counts.values())) > 1:
                told = ", ".join(f"{name} {count}" for name, count in counts.items())
                found.append(f"{what} tokens differ at {load}: {told}")
    return found


def markdown(
    head: Mapping[str, str],
    results: Sequence[Result],
    loads: Sequence[Load],
    num_rounds: int,
    ceilings: Ceilings,
    perplexity: Mapping[str, str],
) -> str:
    lines = ["# xLLM and its peers", "", *[f"* {name}: {value}" for name, value in head.items()], ""]
    lines += [f"**{line}**" if line[:1].isupper() else line for line in warnings(results, num_rounds)]
    lines += ["", f"Medians of {num_rounds} interleaved rounds (least–greatest).", ""]
    for load in loads:
        what = "prompt" if load.is_prefill else "output"
        lines += [
            f"## {load.name}: {what} tokens/s",
            "",
            *table((COLUMNS, *rows(results, load, ceilings))),
            "",
        ]
        lines += best(results, load)
    lines += goodput.section(results, loads)
    lines += single_stream(results, loads, ceilings)
    lines += ["## Engines", "", *table((_ENGINE_COLUMNS, *_engine_rows(results, perplexity))), ""]
    lines += [
        f"* {r.entry.name}: {'; '.join(f'{k} {v}' for k, v in r.about.items())}" for r in results if r.about
    ]
    return "\n".join(lines) + "\n"


_ENGINE_COLUMNS = (
    "engine",
    "start to first answer s",
    "memory (PSS) MiB",
    "perplexity of these weights in xllm",
)


def _engine_rows(results: Sequence[Result], perplexity: Mapping[str, str]) -> list[tuple[str, ...]]:
    made: list[tuple[str, ...]] = []
    for result in results:
        started = f"{result.start_s:.1f}" if result.start_s else result.problem.splitlines()[0][:80]
        memory = f"{result.memory_bytes / 2**20:.0f}" if result.memory_bytes else "–"
        made.append(
            (result.entry.name, started, memory, perplexity.get(result.entry.weights, "not measured"))
        )
    return made


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |"

    return [
        line(cells[0]),
        "|" + "|".join("-" * (width + 2) for width in widths) + "|",
        *map(line, cells[1:]),
    ]
