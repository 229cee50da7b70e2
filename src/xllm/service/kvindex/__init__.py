"""Which instance can read which KV page: the front's picture of all prefix caches."""

from xllm.service.kvindex.index import TIERS, KvIndex

__all__ = ["TIERS", "KvIndex"]
