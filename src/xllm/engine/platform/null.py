"""The null platform: any model's shapes and vocabulary, no weights, logits that are a hash of the KV.

For trying the service, the policies and the API without computing anything.
"""

from __future__ import annotations

from xllm.arch import ArchConfig
from xllm.config.schema import EngineConfig
from xllm.engine.model.layout import kv_layout
from xllm.engine.platform.base import BuiltRunner, Platform, TensorSource
from xllm.engine.platform.null_mapper import NullMapper
from xllm.engine.platform.null_runner import NullRunner, token_pages
from xllm.engine.sampling import Sampler
from xllm.engine.surviving import SharedPages
from xllm.types import PAGE_SIZE


class NullPlatform:
    name = "null"
    runner_type: type[NullRunner] = NullRunner

    def __init__(self, shared: SharedPages | None = None) -> None:
        self._shared = shared

    def over(self, shared: SharedPages) -> NullPlatform:
        """The same platform, with its tokens in memory that outlives the process."""
        return type(self)(shared)

    def why_not(self, config: EngineConfig, arch: ArchConfig) -> tuple[str, ...]:
        return ()

    def create_runner(
        self,
        arch: ArchConfig,
        tensors: TensorSource,
        config: EngineConfig,
        max_model_len: int,
        sampler: Sampler,
    ) -> BuiltRunner:
        layout = kv_layout(arch, "float32")
        # A page is 256 bytes here, so there is room for every sequence at full length.
        most = config.scheduler.max_num_seqs * -(-max_model_len // PAGE_SIZE)
        per_group = config.cache.num_pages or most
        num_pages = (per_group,) * len(layout.groups)
        kv = None if self._shared is None else token_pages(self._shared, num_pages)
        spaces = None
        if config.cache.kv_memory == "xtensor":
            num_spaces = per_group + config.scheduler.max_num_seqs
            spaces = NullMapper(len(num_pages), num_spaces, -(-max_model_len // PAGE_SIZE))
        return BuiltRunner(
            runner=self.runner_type(layout, num_pages, arch.vocab_size, sampler, kv=kv, spaces=spaces),
            num_pages=num_pages,
            mapper=spaces,
            report=(
                f"num_pages={per_group} per KV group",
                "platform null computes nothing: tokens are hashes",
            ),
        )


PLATFORM: Platform = NullPlatform()
