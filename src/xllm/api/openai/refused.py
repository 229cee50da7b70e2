"""Names of request fields that are refused: those not built yet, and those no client may set.

A field that is refused only for some values says which value is harmless. What is in no list and
read by nobody is ignored and named in the `x-ignored-params` header.
"""

from __future__ import annotations

from typing import Any

from xllm.api.fields import Fields, bad_value, unsupported

# They steer our own machinery: accepting one from a client would let it reach other requests.
INTERNAL = frozenset(
    {
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "bootstrap_pair_key",
        "custom_logit_processor",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "ec_transfer_params",
        "extra_key",
        "kv_transfer_params",
        "mm_hashes",
        "mm_placeholders",
        "multi_modal_data",
        "rid",
    }
)

# name → the value that asks for nothing (None: any value asks for something)
NOT_BUILT: dict[str, Any] = {
    "audio": None,
    "best_of": None,
    "chat_template": None,
    "documents": None,
    "ebnf": None,
    "function_call": None,
    "functions": None,
    "grammar": None,
    "guided_choice": None,
    "guided_grammar": None,
    "guided_json": None,
    "guided_regex": None,
    "length_penalty": 1.0,
    "logprob_token_ids": None,
    "lora_path": None,
    "media_io_kwargs": None,
    "mm_processor_kwargs": None,
    "modalities": ["text"],
    "prediction": None,
    "prompt_embeds": None,
    "regex": None,
    "repetition_detection": None,
    "return_hidden_states": False,
    "store": False,
    "structured_outputs": None,
    "suffix": "",
    "thinking_token_budget": None,
    "truncation_side": "left",
    "use_beam_search": False,
    "verbosity": None,
    "vllm_xargs": None,
    "watermarking": None,
    "web_search_options": None,
}


def refuse_unsupported(fields: Fields) -> None:
    """Raises RequestError: unknown_parameter for internal names, unsupported_parameter for the rest."""
    for name in sorted(INTERNAL.intersection(fields.unread())):
        raise bad_value(name, "may not be set by clients", "unknown_parameter")
    for name in sorted(NOT_BUILT.keys() & set(fields.unread())):
        value = fields.take(name)
        if value is not None and value != NOT_BUILT[name]:
            raise unsupported(name)
    tier = fields.string("service_tier")
    if tier not in (None, "auto", "default"):
        raise unsupported("service_tier", "may only be auto or default")
    form = fields.obj("response_format")
    if form is not None and form.get("type") != "text":
        raise unsupported("response_format", "may only be of type text: constrained output is not built yet")


def read_inert(fields: Fields) -> None:
    """Fields that change nothing here, but whose types are checked."""
    fields.string("user", max_chars=512)
    fields.string("safety_identifier", max_chars=512)
    fields.string("prompt_cache_key", max_chars=512)
    metadata = fields.obj("metadata")
    if metadata is not None and (
        len(metadata) > 16 or not all(isinstance(v, str) and len(v) <= 512 for v in metadata.values())
    ):
        raise bad_value("metadata", "may have at most 16 keys with strings of at most 512 characters")
