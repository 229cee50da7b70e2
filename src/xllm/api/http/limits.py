"""Every bound of the HTTP layer in one value."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.config import ServerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Sizes in bytes, times in seconds.

    A body may take `body_timeout_s` plus its length so far over `min_body_bytes_per_s`: a sender
    of one byte a second is cut at the limit, a large honest upload is not. Of chunks of less than
    64 bytes on average only `max_small_chunks` are read.
    """

    max_head_bytes: int = 64 * 1024
    max_headers: int = 100
    max_target_bytes: int = 4096
    max_body_bytes: int = 32 * 1024 * 1024
    max_small_chunks: int = 8192
    max_connections: int = 1024
    max_pipelined_bytes: int = 64 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    min_body_bytes_per_s: int = 256 * 1024
    keep_alive_timeout_s: float = 75.0
    write_timeout_s: float = 60.0
    write_buffer_bytes: int = 256 * 1024
    linger_s: float = 2.0

    @classmethod
    def from_config(cls, config: ServerConfig) -> HttpLimits:
        return cls(
            max_body_bytes=config.max_body_bytes,
            max_connections=config.max_connections,
            header_timeout_s=config.header_timeout_s,
            body_timeout_s=config.body_timeout_s,
            keep_alive_timeout_s=config.keep_alive_timeout_s,
        )
