"""Configuration: frozen dataclasses per concern and their loader.

`schema` holds the values, `load` merges file < env < CLI < keyword, `env` is the only reader of
the environment. No component takes more than its own dataclass.
"""

from xllm.config.schema import (
    CacheConfig,
    ClusterConfig,
    EngineConfig,
    FrontConfig,
    ModelConfig,
    ObservabilityConfig,
    PlatformConfig,
    SchedulerConfig,
    ServerConfig,
)

__all__ = [
    "CacheConfig",
    "ClusterConfig",
    "EngineConfig",
    "FrontConfig",
    "ModelConfig",
    "ObservabilityConfig",
    "PlatformConfig",
    "SchedulerConfig",
    "ServerConfig",
]
