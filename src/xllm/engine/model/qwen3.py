"""Qwen3 (dense): Llama's block with an RMS norm over each query and key head before rotation."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.arch import ArchConfig
from xllm.engine.model.definition import ModelDefinition, Param
from xllm.engine.model.llama import forward, head
from xllm.engine.model.params import decoder_params
from xllm.engine.model.rope import arch_ropes


def parameters(arch: ArchConfig) -> Sequence[Param]:
    return decoder_params(arch, ("input_layernorm", "post_attention_layernorm"), qk_norm=True)


DEFINITION = ModelDefinition(parameters=parameters, ropes=arch_ropes, forward=forward, head=head)
