"""One frozen dataclass per concern; the CLI flags, the file keys and the docs are made from these.

Field names are the flag names (`max_num_seqs` → `--max-num-seqs`). `help` stands in the metadata.
None means "chosen by resolve()", which prints the reason. Nothing here reads files or environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str, **meta: Any) -> Any:
    """A dataclass field with its help text. `has_flag=False`: set in the file only, being rarely changed."""
    return field(default=default, metadata={"help": help, **meta})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights, and how they are read."""

    model: str = option("", "catalogue name, Hugging Face directory or hub id, or .gguf file")
    tokenizer: str | None = option(None, "directory or file with the tokenizer, if not the model's")
    revision: str | None = option(None, "hub revision")
    served_model_name: tuple[str, ...] = option((), "names clients use; default: the model argument")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = option("auto", "compute and KV dtype")
    quantize: Literal["auto", "none", "file", "w8g32", "w4g32", "w8a8"] = option(
        "auto",
        "weights on the native platform; none = bfloat16, file = codes as the file has them, "
        "w8a8 = fastest for large batches, some accuracy lost",
    )
    weights_cache: str = option(
        "auto",
        "directory of packed weights that engines share; auto = in the cache directory, off = none",
        has_flag=False,
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = option(
        "auto", "dummy = random weights of the right shape"
    )
    max_model_len: int | None = option(None, "context limit in tokens; default: the model's")
    chat_template: str | None = option(None, "path of a Jinja file instead of the model's template")
    seed: int = option(0, "seed of dummy weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """KV memory."""

    kv_cache_memory_bytes: int | None = option(None, "bytes for KV pages; default: a share of free memory")
    num_pages: int | None = option(None, "pages per KV group; overrides kv_cache_memory_bytes")
    kv_cache_dtype: Literal["auto", "int8"] = option(
        "auto",
        "auto = as dtype; int8 = codes with a scale per token and head, half the memory (native platform)",
    )
    enable_prefix_caching: bool = option(True, "reuse pages of equal prefixes")
    kv_memory: Literal["auto", "paged", "xtensor"] = option(
        "auto",
        "paged: kernels look pages up; xtensor: they see a sequence's pages in one piece (native platform)",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Budgets of one step and of the queue."""

    max_num_seqs: int = option(64, "sequences that run at once")
    max_num_batched_tokens: int = option(512, "rows computed in one step")
    enable_chunked_prefill: bool = option(True, "off: a prompt is computed in one piece")
    enable_step_time_budget: bool = option(
        True,
        "beside running streams, prompts get the rows that keep the streams' time per token",
        has_flag=False,
    )
    scheduling_policy: str = option("fcfs", "fcfs, priority, or an entry point of xllm.scheduler_orders")
    async_scheduling: Literal["auto", "on", "off"] = option(
        "auto", "plan the next step while one runs; auto = where the platform can run them back to back"
    )
    max_num_queued_reqs: int = option(256, "requests an instance holds beyond the running ones")
    logits_processors: tuple[str, ...] = option((), "entry points of xllm.logits_processors, in order")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformConfig:
    """Where the maths runs."""

    platform: str = option("auto", "native, cpu, cuda, null, or an entry point of xllm.platforms")
    num_threads: int | None = option(None, "compute threads; default: cores ÷ local instances")
    programs: Literal["auto", "on", "off"] = option(
        "auto", "replay recorded steps instead of calling op by op; auto = where the platform can"
    )
    cpus: str | None = option(None, "CPUs that the engine's threads are bound to, e.g. 0-3,8; default: none")
    num_local_instances: int = option(
        1, "engines that share this machine's cores and memory; serve counts its own", has_flag=False
    )
    memory_bytes: int | None = option(
        None,
        "what the engines of this machine may take together; default: what its containers leave, or four "
        "fifths of what is free",
        has_flag=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilityConfig:
    """What a process tells of itself; the same for a front and its engines."""

    otlp_endpoint: str | None = option(
        None, "OTLP/HTTP address that traces go to, e.g. http://host:4318", has_flag=False
    )
    profile_dir: str | None = option(
        None, "directory that POST /stop_profile writes traces to; none = no profiles", has_flag=False
    )
    profile_max_events: int = option(100_000, "events that each process records at most", has_flag=False)
    profile_max_s: float = option(60.0, "seconds until a profile ends by itself", has_flag=False)
    log_format: Literal["text", "json"] = option("text", "form of log lines", has_flag=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    """How an engine exchanges KV pages with its peers."""

    transfer: Literal["auto", "shm", "tcp", "mooncake", "off"] = option(
        "auto", "way of KV pages between engines; auto = shm on one machine, else tcp", has_flag=False
    )
    transfer_listen: str = option(
        "127.0.0.1:0", "address on which KV pages are taken over tcp", has_flag=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All that an engine process needs; it crosses the wire in `Start`."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    platform: PlatformConfig = PlatformConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    transfer: TransferConfig = TransferConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontConfig:
    """Admission, routing and failure limits of the front."""

    router_policy: str = option(
        "cache-aware",
        "round-robin, least-load, cache-aware, slo-aware, or an entry point of xllm.router_policies",
    )
    max_num_inflight_reqs: int = option(1024, "accepted and not yet ended requests; beyond: 429")
    max_num_inflight_tokens: int = option(
        4_194_304, "prompt tokens of those requests; beyond: 429", has_flag=False
    )
    max_kv_oversubscription: float = option(
        4.0, "predicted KV pages of those requests over the pages there are; beyond: 429", has_flag=False
    )
    max_queue_delay_s: float = option(
        5.0, "predicted wait for a first token; beyond, and nothing idle: 429; 0 = no limit", has_flag=False
    )
    stream_buffer_tokens: int = option(
        4096, "tokens kept for a slow reader before its request is cancelled", has_flag=False
    )
    slow_reader_timeout_s: float = option(
        30.0, "seconds a full stream buffer may stand still", has_flag=False
    )
    shutdown_timeout_s: float = option(30.0, "seconds running requests may take to end on SIGTERM")
    start_timeout_s: float = option(600.0, "seconds an engine may take to load", has_flag=False)
    suspect_floor_s: float = option(
        2.0, "seconds without progress before an engine is suspected, at least", has_flag=False
    )
    suspect_factor: float = option(
        5.0, "or this many times the predicted rest of its step, if that is longer", has_flag=False
    )
    hang_kill_s: float = option(
        10.0, "seconds a suspect may stay silent before a local one is killed", has_flag=False
    )
    recovery_grace_s: float = option(
        30.0, "seconds running requests wait for an instance when none is left", has_flag=False
    )
    max_resumes: int = option(8, "requests that one instance takes over at a time", has_flag=False)
    transfer_mode: Literal["push", "pull"] = option(
        "push",
        "who moves KV pages at a hand-over: the engine that has them, or the one that needs them",
        has_flag=False,
    )
    role_control: Literal["static", "adaptive"] = option(
        "static", "static: roles stay as started; adaptive: they follow the load", has_flag=False
    )
    role_period_s: float = option(1.0, "seconds between two looks at the roles", has_flag=False)
    slo_ttft_ms: float = option(1000.0, "time to first token that roles are controlled for", has_flag=False)
    slo_tpot_ms: float = option(100.0, "time per further token that roles are controlled for", has_flag=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Who belongs together and how they find each other. Keys and addresses of the inside, never HTTP."""

    instances: str = option("mixed:1", "engines that serve starts, as role:count")
    registry: str = option("embedded", "embedded, or etcd://host:port[,host:port] for several machines")
    cluster: str = option(
        "default", "name of the cluster in the registry; members of others are refused", has_flag=False
    )
    cluster_key_file: str | None = option(
        None, "file with the key that members prove to know; needed beyond this machine"
    )
    listen: str = option("127.0.0.1:0", "address an instance takes fronts on")
    advertise: str | None = option(
        None, "address told to fronts, if it is not the one listened on", has_flag=False
    )
    instance_id: str | None = option(None, "lasting name of an instance; default: drawn", has_flag=False)
    role: Literal["mixed", "prefill", "decode"] = option(
        "mixed", "what fronts first use an instance for; it can do everything", has_flag=False
    )
    lease_ttl_s: float = option(5.0, "seconds until a silent member leaves the registry", has_flag=False)
    relist_s: float = option(10.0, "seconds between two full readings of the registry", has_flag=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP side."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 = any free one")
    api_key: tuple[str, ...] = option((), "accepted bearer keys; none = open")
    admin_key: tuple[str, ...] = option(
        (), "keys for /instances and the like; none = api_key, and those of this machine only", has_flag=False
    )
    ssl_certfile: str | None = option(None, "PEM file with the certificate chain; turns TLS on")
    ssl_keyfile: str | None = option(None, "PEM file with its private key")
    usage_db: str | None = option(
        None, "SQLite file for usage records, one row per ended request", has_flag=False
    )
    allowed_origins: tuple[str, ...] = option((), "CORS origins; default: none", has_flag=False)
    allowed_hosts: tuple[str, ...] = option((), "accepted Host names beyond the bound address and localhost")
    max_body_bytes: int = option(32 * 1024 * 1024, "largest request body", has_flag=False)
    max_connections: int = option(1024, "open connections; beyond: closed at once", has_flag=False)
    header_timeout_s: float = option(10.0, "seconds for the request head", has_flag=False)
    body_timeout_s: float = option(30.0, "seconds for the request body", has_flag=False)
    keep_alive_timeout_s: float = option(75.0, "seconds an idle connection is kept", has_flag=False)
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least severity that is logged")
