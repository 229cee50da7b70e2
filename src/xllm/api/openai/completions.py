"""POST /v1/completions: prompts in (text or tokens), continuations out, whole or as events.

Translation only: reading the body, one draft per prompt, formatting. With `echo` the prompt and
its log probabilities stand before the output, as evaluation harnesses need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from xllm.api.context import Context, Model
from xllm.api.explain import explanation, wants_explanation
from xllm.api.fields import Fields, bad_value, read_items, wrong_type
from xllm.api.http import Reply, Request
from xllm.api.openai.batch import Batch, last_chunk, submit_all, usage_json
from xllm.api.openai.collect import Choice, collect
from xllm.api.openai.ignored import ignored_header
from xllm.api.openai.logprobs import CompletionLogprobs, prompt_logprobs_json
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
from xllm.types import SamplingParams

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A read request, ready to be submitted."""

    model: Model
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    delivery: Delivery
    echo: bool
    wants_prompt_logprobs: bool
    priority: int
    cache_salt: str
    deadline_ms: float | None
    ignored: tuple[tuple[str, str], ...]

    def draft(self, prompt: Prompt) -> RequestDraft:
        params = self.params
        if params.max_tokens is None:
            room = self.model.card.max_model_len - len(prompt.token_ids)
            params = msgspec.structs.replace(params, max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)))
        return RequestDraft(
            model=self.model.name,
            prompt_token_ids=prompt.token_ids,
            params=params,
            priority=self.priority,
            cache_salt=self.cache_salt,
            deadline_ms=self.deadline_ms,
        )


async def completions(context: Context, request: Request, reply: Reply, body: dict[str, Any]) -> None:
    job = await read_job(context, request, Fields(body))
    explain = wants_explanation(request)
    batch = await submit_all(context.front, [context.stamped(job.draft(p), request) for p in job.prompts])
    request.serves = batch.request_ids
    more = (lambda: explanation(context, batch.request_ids)) if explain else None
    try:
        base: dict[str, Any] = {
            "id": f"cmpl-{batch.streams[0].request_id}",
            "object": "text_completion",
            "created": context.now_s(),
            "model": job.model.name,
            "system_fingerprint": job.model.fingerprint,
        }
        if job.delivery.stream:
            await send_stream(reply, batch, _Events(job, batch, base, more), job.ignored)
            return
        choices = await collect(batch)
        formats = [_ChoiceFormat(job, i // batch.n) for i in range(len(choices))]
        base["choices"] = [f.whole(i, c) for i, (f, c) in enumerate(zip(formats, choices, strict=True))]
        base["usage"] = usage_json(batch.usage())
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
    model = context.model(fields)
    delivery = read_delivery(fields)
    echo = fields.boolean("echo")
    logprobs = fields.integer("logprobs")
    prompt_logprobs = fields.integer("prompt_logprobs")
    params = read_sampling(
        fields,
        model.card,
        max_tokens=fields.integer("max_tokens"),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo and prompt_logprobs is None else prompt_logprobs,
    )
    if echo and delivery.stream and logprobs is not None and params.n > 1:
        raise bad_value("echo", "with logprobs, stream and n > 1 is not built", "unsupported_combination")
    prompts = await _read_prompts(context, model, fields, len(await request.body()))
    return Job(
        model=model,
        prompts=prompts,
        params=params,
        delivery=delivery,
        echo=echo,
        wants_prompt_logprobs=prompt_logprobs is not None,
        priority=fields.integer("priority") or 0,
        cache_salt=read_cache_salt(fields),
        deadline_ms=read_deadline_ms(request),
        ignored=ignored_header(fields),
    )


async def _read_prompts(context: Context, model: Model, fields: Fields, size: int) -> tuple[Prompt, ...]:
    special = fields.boolean("add_special_tokens", True)
    keep = fields.integer("truncate_prompt_tokens")
    if keep is not None and keep < 1:
        raise bad_value("truncate_prompt_tokens", "must be at least 1", "value_out_of_range")
    given = _prompt_list(fields.require("prompt"))
    tokenizer, limit = model.text.tokenizer, None if keep else model.card.max_model_len

    def encode() -> tuple[Prompt, ...]:
        return tuple(
            Prompt(token_ids=tuple(tokenizer.encode(p, add_special_tokens=special, max_tokens=limit)), text=p)
            if isinstance(p, str)
            else Prompt(token_ids=p, text="")
            for p in given
        )

    prompts = await context.run_text(size, encode)
    if keep is None:
        return prompts
    return tuple(replace(p, token_ids=p.token_ids[-keep:], text="") for p in prompts)


def _prompt_list(value: Any) -> Sequence[str | tuple[int, ...]]:
    """The four forms of `prompt` as a list of texts or token lists."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise wrong_type("prompt", "a string, a list of strings, a list of token ids, or a list of those")
    if not value:
        raise bad_value("prompt", "must not be empty")
    if type(value[0]) is int:
        return [_token_ids(value, "prompt")]
    return read_items(value, "prompt", _one_prompt, MAX_PROMPTS)


def _one_prompt(value: Any, path: str) -> str | tuple[int, ...]:
    if value in ("", []):
        raise bad_value(path, "must not be empty")
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _token_ids(value, path)
    raise wrong_type(path, "a string or a list of token ids")


def _token_ids(value: list[Any], path: str) -> tuple[int, ...]:
    # A body can hold millions: paths are only made for the entry that is wrong. Range: the front.
    if not all(type(v) is int for v in value):
        wrong = next(i for i, v in enumerate(value) if type(v) is not int)
        raise wrong_type(f"{path}[{wrong}]", "a token id")
    return tuple(value)


class _ChoiceFormat:
    """One choice's JSON, whole or in pieces; keeps the running text offset of its logprobs."""

    def __init__(self, job: Job, prompt: int) -> None:
        self._job = job
        self._prompt = job.prompts[prompt]
        self._tokenizer = job.model.text.tokenizer
        self._logprobs = CompletionLogprobs(self._tokenizer, tokens_as_ids=job.delivery.tokens_as_ids)
        self._wants_tokens = job.params.logprobs is not None or job.delivery.return_token_ids
        self._first = True

    def is_only_text(self, delta: Delta) -> bool:
        """Whether a chunk tells no more than the text of `delta`."""
        return not (self._wants_tokens or self._first or delta.finish_reason or delta.prompt_logprobs)

    def piece(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """A stream chunk's choice; None when there is nothing to tell yet."""
        if not (delta.text or delta.finish_reason or self._first or (self._wants_tokens and delta.token_ids)):
            return None
        piece = Choice(
            delta.text,
            list(delta.token_ids),
            list(delta.logprobs),
            delta.finish_reason,
            delta.stop_reason,
            delta.prompt_logprobs,
        )
        return self.whole(index, piece)

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        job, ids, text = self._job, list(choice.token_ids), choice.text
        entries: list[Any] = list(choice.logprobs)
        if job.echo and self._first:
            text = self._prompt_text() + text
            if choice.prompt_logprobs is not None:
                ids = [*self._prompt.token_ids, *ids]
                entries = [None, *choice.prompt_logprobs, *entries]
        out: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None if job.params.logprobs is None else self._logprobs.add(ids, entries),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if job.delivery.return_token_ids:
            out["token_ids"] = choice.token_ids
            if self._first:
                out["prompt_token_ids"] = self._prompt.token_ids
        if job.wants_prompt_logprobs and choice.prompt_logprobs is not None:
            out["prompt_logprobs"] = prompt_logprobs_json(self._tokenizer, choice.prompt_logprobs)
        self._first = False
        return out

    def _prompt_text(self) -> str:
        if self._prompt.text:
            return self._prompt.text
        skip = self._job.params.skip_special_tokens
        return self._tokenizer.decode(list(self._prompt.token_ids), skip_special_tokens=skip)


class _Events:
    """The events of a stream; see `streaming.Form`."""

    def __init__(
        self, job: Job, batch: Batch, base: dict[str, Any], explain: Callable[[], dict[str, Any]] | None
    ) -> None:
        self._batch, self._base, self._explain = batch, base, explain
        self._delivery = job.delivery
        self._formats = [_ChoiceFormat(job, i // batch.n) for i in range(batch.num_choices)]
        self._texts: dict[int, TextEvent] = {}

    def piece(self, index: int, delta: Delta) -> bytes:
        form = self._formats[index]
        if form.is_only_text(delta) and not self._delivery.continuous_usage:
            if not delta.text:
                return b""
            text_event = self._texts.get(index)
            if text_event is None:
                text_event = self._texts[index] = self._text_event(index)
            return text_event(delta.text)
        choice = form.piece(index, delta)
        return b"" if choice is None else event(self._chunk(choice))

    def last(self) -> bytes:
        last = last_chunk(self._batch, include_usage=self._delivery.include_usage, explain=self._explain)
        return event({**self._base, "choices": [], **last}) if last else b""

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        value = {**self._base, "choices": [choice]}
        if self._delivery.continuous_usage:
            value["usage"] = usage_json(self._batch.usage())
        elif self._delivery.include_usage:
            value["usage"] = None
        return value

    def _text_event(self, index: int) -> TextEvent:
        form = self._formats[index]
        return TextEvent(lambda text: self._chunk(form.piece(index, Delta(choice=index, text=text))))


def renamed(error: RequestError, old: str, new: str) -> RequestError:
    """The same refusal under the name this endpoint has for the field."""
    message = error.message.replace(f"'{old}'", f"'{new}'")
    return RequestError(message, code=error.code, param=new)
