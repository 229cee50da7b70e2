"""Judges a finished run: exact outputs, one ending each, nothing left behind, no error undeserved.

Pure over what was recorded. It knows what the faults excuse, and nothing else excuses anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.service.failover.blame import QUARANTINE_AT
from xllm.simulation.client import Outcome
from xllm.simulation.golden import ChoiceOutput, Output, joined
from xllm.simulation.record import QUIET_BEFORE_S, Record, SeenFault

DETECT_S = {"crash": 0.3, "stop": 3.0}
"""A crash by EOF; silence by the rule's floor of 2 s, a pulse's interval and a tick of the guard."""
CLOCK_SLACK_S = 0.002
"""A timer fires at least a tick after its time (`LiveRequest._arm`)."""


def judge(record: Record) -> list[str]:
    """What is wrong, in words; empty = all is well."""
    wrong: list[str] = []
    for outcome in record.outcomes:
        wrong += [f"request {outcome.index}: {what}" for what in _request(outcome, record)]
    wrong += _leftovers(record)
    return wrong


def _request(outcome: Outcome, record: Record) -> Iterable[str]:
    if outcome.ended_s is None:
        yield "never ended"
        return
    if outcome.refused is not None:
        if not _refusal_deserved(outcome, record):
            yield f"was refused with {outcome.refused.code} for no reason"
        return
    if outcome.spec is None:
        yield "failed before it was refused or accepted"
        return
    if (ends := record.num_ended.get(outcome.spec.request_id, 0)) != 1:
        yield f"the front ended it {ends} times"
    if outcome.request.is_poison:
        yield from _poison(outcome, record)
        return
    got = joined(outcome.deltas, outcome.spec.params.n)
    golden = record.golden(outcome.spec)
    if outcome.error is None and not outcome.left:
        yield from _complete(outcome, got, golden)
        return
    yield from _partial(got, golden)
    if outcome.error is not None and not _error_deserved(outcome, record):
        yield f"ended with {outcome.error.code} for no reason: {outcome.error.message}"


def _poison(outcome: Outcome, record: Record) -> Iterable[str]:
    """It kills whoever computes it: nothing may come of it, and it must not go on for ever."""
    if outcome.deltas:
        yield "gave output, though no engine survives it"
    if outcome.error is None and not outcome.left:
        yield "ended well, though no engine survives it"
    error = outcome.error
    if error is None or error.code == "request_quarantined" or _error_deserved(outcome, record):
        return
    yield f"ended with {error.code}, not by quarantine"


def _complete(outcome: Outcome, got: Output, golden: Output) -> Iterable[str]:
    for index, (mine, right) in enumerate(zip(got.choices, golden.choices, strict=True)):
        if mine != right:
            yield f"choice {index} differs from the run alone: {_difference(mine, right)}"
    if got.num_ends != (1,) * len(golden.choices):
        yield f"choices ended {got.num_ends} times"
    if got.prompt_logprobs != golden.prompt_logprobs:
        yield "prompt_logprobs differ from the run alone"
    num_tokens = sum(len(c.token_ids) for c in golden.choices)
    if outcome.usage is None or outcome.usage.completion_tokens != num_tokens:
        yield f"usage {outcome.usage} does not say {num_tokens} tokens"
    elif outcome.usage.prompt_tokens != len(outcome.request.prompt):
        yield f"usage {outcome.usage} miscounts the prompt"


def _partial(got: Output, golden: Output) -> Iterable[str]:
    """What was delivered before a bad end stays valid: a beginning of the right answer."""
    for index, (mine, right) in enumerate(zip(got.choices, golden.choices, strict=True)):
        num = len(mine.token_ids)
        if mine.token_ids != right.token_ids[:num] or not right.text.startswith(mine.text):
            yield f"choice {index} is no beginning of the run alone: {_difference(mine, right)}"
        if mine.logprobs != right.logprobs[: len(mine.logprobs)]:
            yield f"logprobs of choice {index} differ from the run alone"
        if got.num_ends[index] > 1:
            yield f"choice {index} ended {got.num_ends[index]} times"


def _difference(mine: ChoiceOutput, right: ChoiceOutput) -> str:
    for field in ChoiceOutput.__slots__:
        if getattr(mine, field) != getattr(right, field):
            return f"{field} is {getattr(mine, field)!r}, not {getattr(right, field)!r}"
    return "nothing"


def _refusal_deserved(outcome: Outcome, record: Record) -> bool:
    match outcome.refused.code if outcome.refused is not None else "":
        case "queue_full":
            return record.may_be_full
        case "no_healthy_instance" | "model_not_found":
            return record.was_without_instance(outcome.submitted_s)
        case "slow_down":
            return outcome.request.deadline_ms is not None
    return False


def _error_deserved(outcome: Outcome, record: Record) -> bool:
    request, ended_s = outcome.request, outcome.ended_s or 0.0
    match outcome.error.code if outcome.error is not None else "":
        case "aborted":
            return outcome.left
        case "deadline_exceeded":
            due_s = outcome.submitted_s + (request.deadline_ms or float("inf")) / 1000
            return ended_s >= due_s - CLOCK_SLACK_S
        case "slow_reader":
            return request.habit in ("stall", "slow")
        case "queue_full":
            return record.may_be_full
        case "request_quarantined":
            # Whoever shared an engine with a request that kills may have seen that crash: nobody can tell
            # them apart by it, so one other failure without a token in between is the second.
            crash = 1.0 if any(o.request.is_poison for o in record.outcomes) else 0.0
            return record.timeline.blame + crash >= QUARANTINE_AT
        case "no_healthy_instance":
            # It must have waited for the whole grace, and nobody may have been there for long meanwhile.
            start_s = ended_s - record.recovery_grace_s
            return outcome.submitted_s <= start_s and not record.timeline.throughout(
                start_s + record.settle_s, ended_s
            )
    return False


def _leftovers(record: Record) -> Iterable[str]:
    snapshot = record.front
    if snapshot.num_inflight_reqs or snapshot.num_inflight_tokens:
        yield f"admission still counts {snapshot.num_inflight_reqs} requests"
    if snapshot.num_accepted != sum(snapshot.num_ended.values()):
        yield f"{snapshot.num_accepted} accepted, but ended: {snapshot.num_ended}"
    if snapshot.num_divergences:
        yield f"{snapshot.num_divergences} frames contradicted the log"
    if snapshot.num_waiting:
        yield f"{snapshot.num_waiting} requests still wait for an instance"
    for instance in snapshot.instances:
        load = (instance.num_requests, instance.backlog_tokens, instance.context_tokens)
        if any(load):
            yield f"{instance.name} is still charged with (requests, backlog, context) {load}"
    yield from record.engine_faults
    yield from _missed(record)
    yield from _false_suspicions(record)


def _missed(record: Record) -> Iterable[str]:
    """Faults that hit an undisturbed instance and were not found out in time."""
    for fault in record.timeline.faults:
        limit_s = DETECT_S.get(fault.kind)
        lasted_s = float("inf") if fault.kind == "crash" else fault.lasts_s or 0.0
        if not fault.quiet or limit_s is None or lasted_s < limit_s or _joined_by_another(fault, record):
            continue
        if fault.at_s + limit_s > record.ended_s:
            continue
        if not any(
            d.name == fault.name and fault.at_s <= d.at_s <= fault.at_s + limit_s for d in record.detections
        ):
            yield f"the {fault.kind} of {fault.name} at {fault.at_s:.3f} was not found out in {limit_s:g} s"


def _joined_by_another(fault: SeenFault, record: Record) -> bool:
    """Another fault of the same instance in the meantime makes the limit meaningless."""
    others = (f for f in record.timeline.faults if f is not fault and f.name == fault.name)
    return any(fault.at_s <= f.at_s <= fault.at_s + DETECT_S[fault.kind] for f in others)


def _false_suspicions(record: Record) -> Iterable[str]:
    for found in record.detections:
        start_s = found.at_s - QUIET_BEFORE_S
        if found.state == "suspect" and record.timeline.usable_throughout(found.name, start_s, found.at_s):
            yield f"{found.name} was suspected ({found.reason}) at {found.at_s:.3f} for no reason"
