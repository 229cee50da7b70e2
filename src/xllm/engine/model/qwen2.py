"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v (`arch.attention_bias`)."""

from __future__ import annotations

from xllm.engine.model.definition import ModelDefinition
from xllm.engine.model.llama import forward, head, parameters
from xllm.engine.model.rope import arch_ropes

DEFINITION = ModelDefinition(parameters=parameters, ropes=arch_ropes, forward=forward, head=head)
