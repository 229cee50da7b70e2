"""Names that users of other servers type from memory, and the field each means here.

A table only. Spellings whose meaning differs (blocks of another size, shares of a device) stay out:
a wrong number silently taken over is worse than an unknown flag with a hint.
"""

from __future__ import annotations

ALIASES: dict[str, str] = {
    # The C++ xLLM.
    "max_seqs_per_batch": "max_num_seqs",
    "max_tokens_per_batch": "max_num_batched_tokens",
    "enable_prefix_cache": "enable_prefix_caching",
    "load_balance_policy": "router_policy",
    "http_server_port": "port",
    # SGLang.
    "model_path": "model",
    "tokenizer_path": "tokenizer",
    "context_length": "max_model_len",
    "max_running_requests": "max_num_seqs",
    "max_queued_requests": "max_num_queued_reqs",
    "chunked_prefill_size": "max_num_batched_tokens",
    "schedule_policy": "scheduling_policy",
    "device": "platform",
    # vLLM where our name carries a unit or another noun.
    "shutdown_timeout": "shutdown_timeout_s",
    # llama.cpp.
    "ctx_size": "max_model_len",
    "parallel": "max_num_seqs",
    "threads": "num_threads",
}

NEGATED: dict[str, str] = {
    "disable_radix_cache": "enable_prefix_caching",
    "disable_chunked_prefill": "enable_chunked_prefill",
}
"""Switches elsewhere that turn one of ours off."""
