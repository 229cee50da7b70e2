"""POST /v1/chat/completions: a conversation in, the assistant's message out, whole or as events.

Translation only. Tools are shown to the model's template; its answer is returned as text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from xllm.api.context import Context, Model
from xllm.api.explain import explanation, wants_explanation
from xllm.api.fields import Fields, bad_value, unsupported
from xllm.api.http import Reply, Request
from xllm.api.openai.batch import Batch, last_chunk, submit_all, usage_json
from xllm.api.openai.collect import Choice, collect
from xllm.api.openai.completions import renamed
from xllm.api.openai.ignored import ignored_header
from xllm.api.openai.logprobs import chat_logprobs, prompt_logprobs_json
from xllm.api.openai.messages import read_messages, read_tools
from xllm.api.openai.params import (
    Delivery,
    read_cache_salt,
    read_deadline_ms,
    read_delivery,
    read_sampling,
)
from xllm.api.openai.refused import read_inert, refuse_unsupported
from xllm.api.openai.streaming import send_stream
from xllm.api.sse import TextEvent, event
from xllm.errors import RequestError
from xllm.service.draft import RequestDraft
from xllm.service.stream import Delta
from xllm.text import encode_chat
from xllm.text.template import TEMPLATE_KWARGS
from xllm.types import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A read request, ready to be submitted. `num_top` is None when no logprobs are wanted."""

    model: Model
    draft: RequestDraft
    delivery: Delivery
    num_top: int | None
    ignored: tuple[tuple[str, str], ...]


async def chat_completions(context: Context, request: Request, reply: Reply, body: dict[str, Any]) -> None:
    job = await read_job(context, request, Fields(body))
    explain = wants_explanation(request)
    try:
        batch = await submit_all(context.front, [context.stamped(job.draft, request)])
    except RequestError as error:
        raise renamed(error, "prompt", "messages") if error.param == "prompt" else error from None
    request.serves = batch.request_ids
    more = (lambda: explanation(context, batch.request_ids)) if explain else None
    try:
        base: dict[str, Any] = {
            "id": f"chatcmpl-{batch.streams[0].request_id}",
            "object": "chat.completion.chunk" if job.delivery.stream else "chat.completion",
            "created": context.now_s(),
            "model": job.model.name,
            "system_fingerprint": job.model.fingerprint,
        }
        if job.delivery.stream:
            await send_stream(reply, batch, _Events(job, batch, base, more), job.ignored)
            return
        choices = await collect(batch)
        base["choices"] = [_whole(job, i, c) for i, c in enumerate(choices)]
        base["usage"] = usage_json(batch.usage())
        if job.delivery.return_token_ids:
            base["prompt_token_ids"] = job.draft.prompt_token_ids
        if (entries := choices[0].prompt_logprobs) is not None:
            base["prompt_logprobs"] = prompt_logprobs_json(job.model.text.tokenizer, entries)
        if more is not None:
            base["xllm"] = more()
        await reply.send(200, msgspec.json.encode(base), job.ignored)
    finally:
        request.serves = batch.request_ids
        await batch.aclose()


async def read_job(context: Context, request: Request, fields: Fields) -> Job:
    """Raises RequestError, NotFoundError."""
    refuse_unsupported(fields)
    read_inert(fields)
    if fields.boolean("echo"):
        raise unsupported("echo")
    model = context.model(fields)
    delivery = read_delivery(fields)
    num_top = _read_logprobs(fields)
    params = read_sampling(
        fields,
        model.card,
        max_tokens=_read_max_tokens(fields),
        logprobs=num_top,
        prompt_logprobs=fields.integer("prompt_logprobs"),
    )
    prompt = await read_chat_prompt(context, model, fields, len(await request.body()))
    draft = RequestDraft(
        model=model.name,
        prompt_token_ids=prompt,
        params=params,
        priority=fields.integer("priority") or 0,
        cache_salt=read_cache_salt(fields),
        deadline_ms=read_deadline_ms(request),
    )
    ignored = ignored_header(fields)
    return Job(model=model, draft=draft, delivery=delivery, num_top=num_top, ignored=ignored)


async def read_chat_prompt(context: Context, model: Model, fields: Fields, size: int) -> tuple[int, ...]:
    """Prompt tokens of `messages`, `tools` and the template's options. Raises RequestError."""
    messages = read_messages(fields)
    tools = read_tools(fields)
    kwargs = _read_template_kwargs(fields)
    goes_on = fields.boolean("continue_final_message")
    opens = fields.boolean("add_generation_prompt", not goes_on)
    if goes_on and opens:
        raise bad_value("continue_final_message", "excludes add_generation_prompt", "unsupported_combination")
    if model.text.template is None:
        raise RequestError(
            "This model has no chat template; use /v1/completions.",
            code="unsupported_parameter",
            param="messages",
        )
    work = partial(
        encode_chat,
        model.text.tokenizer,
        model.text.template,
        messages,
        tools=tools,
        add_generation_prompt=opens,
        continue_final_message=goes_on,
        max_tokens=model.card.max_model_len,
        **kwargs,
    )
    try:
        return tuple(await context.run_text(size, work))
    except RequestError as error:
        raise RequestError(error.message, code=error.code, param=error.param or "messages") from None


def _read_template_kwargs(fields: Fields) -> dict[str, Any]:
    kwargs = fields.obj("chat_template_kwargs") or {}
    for key in kwargs:
        if key not in TEMPLATE_KWARGS:
            raise bad_value(
                "chat_template_kwargs", "has a key that is not supported", "unsupported_parameter"
            )
    if (effort := fields.string("reasoning_effort", max_chars=32)) is not None:
        kwargs.setdefault("reasoning_effort", effort)
    return kwargs


def _read_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs")
    if top is not None and not wanted:
        raise bad_value("top_logprobs", "needs 'logprobs': true", "unsupported_combination")
    return (top or 0) if wanted else None


def _read_max_tokens(fields: Fields) -> int | None:
    old, new = fields.integer("max_tokens"), fields.integer("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise bad_value("max_tokens", "differs from max_completion_tokens", "unsupported_combination")
    return old if new is None else new


def _logprobs(job: Job, entries: list[TokenLogprobs] | tuple[TokenLogprobs, ...]) -> dict[str, Any] | None:
    if job.num_top is None:
        return None
    tokenizer, as_ids = job.model.text.tokenizer, job.delivery.tokens_as_ids
    return chat_logprobs(tokenizer, entries, num_top=job.num_top, tokens_as_ids=as_ids)


def _whole(job: Job, index: int, choice: Choice) -> dict[str, Any]:
    out = {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": _logprobs(job, choice.logprobs),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if job.delivery.return_token_ids:
        out["token_ids"] = choice.token_ids
    return out


def _piece(job: Job, index: int, delta: Delta) -> dict[str, Any]:
    out: dict[str, Any] = {
        "index": index,
        "delta": {"content": delta.text} if delta.text or not delta.finish_reason else {},
        "logprobs": _logprobs(job, delta.logprobs) if delta.token_ids else None,
        "finish_reason": delta.finish_reason,
    }
    if delta.finish_reason is not None:
        out["stop_reason"] = delta.stop_reason
    if job.delivery.return_token_ids:
        out["token_ids"] = delta.token_ids
    return out


class _Events:
    """The events of a stream; see `streaming.Form`."""

    def __init__(
        self, job: Job, batch: Batch, base: dict[str, Any], explain: Callable[[], dict[str, Any]] | None
    ) -> None:
        self._job, self._batch, self._base, self._explain = job, batch, base, explain
        self._delivery = job.delivery
        self._wants_tokens = job.num_top is not None or job.delivery.return_token_ids
        self._only_text = not (self._wants_tokens or job.delivery.continuous_usage)
        self._texts: dict[int, TextEvent] = {}

    def piece(self, index: int, delta: Delta) -> bytes:
        text_event = self._texts.get(index)
        if text_event is None:
            opening = self._opening(index, delta)
            text_event = self._texts[index] = self._text_event(index)
            return opening + self._rest(index, delta, text_event)
        return self._rest(index, delta, text_event)

    def last(self) -> bytes:
        last = last_chunk(self._batch, include_usage=self._delivery.include_usage, explain=self._explain)
        return event({**self._base, "choices": [], **last}) if last else b""

    def _rest(self, index: int, delta: Delta, text_event: TextEvent) -> bytes:
        if self._only_text and delta.finish_reason is None:
            return text_event(delta.text) if delta.text else b""
        if delta.text or delta.finish_reason or (self._wants_tokens and delta.token_ids):
            return event(self._chunk(_piece(self._job, index, delta)))
        return b""

    def _opening(self, index: int, delta: Delta) -> bytes:
        more = {} if self._texts else _prompt_part(self._job, delta)
        first = {"role": "assistant", "content": ""}
        opening = {"index": index, "delta": first, "logprobs": None, "finish_reason": None}
        return event(self._chunk(opening, **more))

    def _chunk(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        value = {**self._base, "choices": [choice], **more}
        if self._delivery.continuous_usage:
            value["usage"] = usage_json(self._batch.usage())
        elif self._delivery.include_usage:
            value["usage"] = None
        return value

    def _text_event(self, index: int) -> TextEvent:
        return TextEvent(lambda text: self._chunk(_piece(self._job, index, Delta(choice=index, text=text))))


def _prompt_part(job: Job, delta: Delta) -> dict[str, Any]:
    """What the first chunk tells of the prompt."""
    out: dict[str, Any] = {}
    if job.delivery.return_token_ids:
        out["prompt_token_ids"] = job.draft.prompt_token_ids
    if delta.prompt_logprobs is not None:
        out["prompt_logprobs"] = prompt_logprobs_json(job.model.text.tokenizer, delta.prompt_logprobs)
    return out
