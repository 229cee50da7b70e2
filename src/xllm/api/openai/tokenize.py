"""POST /tokenize and /detokenize, GET /tokenizer_info: the model's own tokenizer.

Under the same limits as requests. With these three an evaluation harness needs no tokenizer of its own.
"""

from __future__ import annotations

from typing import Any

import msgspec

from xllm.api.context import Context
from xllm.api.fields import Fields, as_integer, bad_value
from xllm.api.http import Reply, Request
from xllm.api.openai.chat import read_chat_prompt
from xllm.api.openai.ignored import ignored_header

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


async def tokenize(context: Context, request: Request, reply: Reply, body: dict[str, Any]) -> None:
    """{prompt | messages, …} → {count, max_model_len, tokens, token_strs?}."""
    fields = Fields(body)
    model = context.model(fields)
    special = fields.boolean("add_special_tokens", True)
    wants_strings = fields.boolean("return_token_strs")
    size = len(await request.body())
    prompt = fields.string("prompt")
    tokenizer = model.text.tokenizer
    if prompt is not None:
        text = prompt
        tokens = await context.run_text(size, lambda: tokenizer.encode(text, add_special_tokens=special))
    else:
        tokens = list(await read_chat_prompt(context, model, fields, size))
    out: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": model.card.max_model_len,
        "tokens": tokens,
        "token_strs": [tokenizer.id_to_token(t) for t in tokens] if wants_strings else None,
    }
    await reply.send(200, msgspec.json.encode(out), ignored_header(fields))


async def detokenize(context: Context, request: Request, reply: Reply, body: dict[str, Any]) -> None:
    """{tokens} → {prompt}; special tokens are shown."""
    fields = Fields(body)
    model = context.model(fields)
    limit = model.card.max_model_len
    tokens = fields.items("tokens", as_integer, limit)
    if tokens is None:
        fields.require("tokens")
    if any(not 0 <= t < model.card.vocab_size for t in tokens or ()):
        raise bad_value("tokens", "must hold token ids of this model", "value_out_of_range")
    text = model.text.tokenizer.decode(list(tokens or ()), skip_special_tokens=False)
    await reply.send(200, msgspec.json.encode({"prompt": text}), ignored_header(fields))


def tokenizer_info(context: Context) -> dict[str, Any]:
    """Special tokens and chat template of the only model. Raises RequestError when there are several."""
    model = context.model(Fields({}))
    config = model.text.text_config
    tokens = {k: config[k] for k in _SPECIAL if isinstance(config.get(k), str)}
    template = model.text.template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": None,
        **tokens,
        "model_max_length": model.card.max_model_len,
        "chat_template": template.source if template else None,
    }
