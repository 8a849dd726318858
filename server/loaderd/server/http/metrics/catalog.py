"""Every metric: its name, what it says, its labels. Units are seconds, bytes and tokens.

`model` is the name of a model that is loaded; when it is unloaded, its series go. Two models of one
name are one series.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: As Prometheus knows it; that of a counter ends in `_total`.
        help: What it says.
        labels: The names of its labels.
        buckets: Upper bounds of a histogram's buckets, in its unit; none for other metrics.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_WAITS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_LOADS_S = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)

BUILD_INFO = Metric("loaderd_build_info", "1, with the daemon's release.", ("version",))
RPC_REQUESTS = Metric(
    "loaderd_rpc_requests_total",
    "Calls over gRPC that have ended, by method and status code.",
    ("method", "code"),
)
HTTP_REQUESTS = Metric(
    "loaderd_http_requests_total",
    "Requests over HTTP that have ended, by route and status code; 499: the client left first.",
    ("route", "code"),
)

QUEUED_REQUESTS = Metric(
    "loaderd_queued_requests", "Requests for text that wait for their turn.", ("model",)
)
RUNNING_REQUESTS = Metric(
    "loaderd_running_requests",
    "Requests for text that are computed now: the size of the batch.",
    ("model",),
)
QUEUE_SECONDS = Metric(
    "loaderd_queue_seconds",
    "From a request's arrival at its model to the begin of its computation.",
    ("model",),
    _WAITS_S,
)
FIRST_TOKEN_SECONDS = Metric(
    "loaderd_time_to_first_token_seconds",
    "From a request's arrival at its model to its first output.",
    ("model",),
    _WAITS_S,
)
INTER_TOKEN_SECONDS = Metric(
    "loaderd_inter_token_seconds",
    "Between two outputs of one completion; each is a token, or several that make a character.",
    ("model",),
    _STEPS_S,
)
PROMPT_TOKENS = Metric(
    "loaderd_prompt_tokens_total",
    "Tokens of prompts that were taken, those of the prefix cache included.",
    ("model",),
)
CACHED_PROMPT_TOKENS = Metric(
    "loaderd_cached_prompt_tokens_total",
    "Tokens of prompts that the prefix cache had.",
    ("model",),
)
GENERATED_TOKENS = Metric(
    "loaderd_generated_tokens_total", "Tokens generated, of all completions.", ("model",)
)
KV_TOKENS = Metric(
    "loaderd_kv_tokens",
    "Tokens that running requests have memory for, for their keys and values.",
    ("model",),
)
KV_CAPACITY = Metric(
    "loaderd_kv_capacity_tokens",
    "Tokens that there is such memory for; absent where the engine knows no bound.",
    ("model",),
)

MODELS = Metric("loaderd_models", "Models that the daemon holds, by state.", ("state",))
ACTIVE_REQUESTS = Metric(
    "loaderd_model_active_requests",
    "Requests of all kinds that use a model, those included whose client has left.",
    ("model",),
)
LEASES = Metric("loaderd_model_leases", "Leases that hold a model.", ("model",))
WORKER_MEMORY = Metric(
    "loaderd_worker_memory_bytes",
    "Memory of a model's processes: resident, and their allocations on accelerators.",
    ("model",),
)
LOAD_SECONDS = Metric(
    "loaderd_load_seconds",
    "How long the phases of loads took that ended well; `total` is the whole load.",
    ("phase",),
    _LOADS_S,
)
LOADS = Metric("loaderd_loads_total", "Loads that have ended, by outcome.", ("outcome",))
UNLOADS = Metric(
    "loaderd_unloads_total",
    "Models that were unloaded, by reason; `evicted`: another model needed the memory.",
    ("reason",),
)
WORKER_DEATHS = Metric(
    "loaderd_worker_deaths_total", "Processes of loaded models that ended by themselves."
)
WORKER_RESTARTS = Metric(
    "loaderd_worker_restarts_total", "Loads that began again for models that had failed."
)

CACHE_BYTES = Metric("loaderd_cache_bytes", "Disk space that the cache's snapshots take.")
CACHE_LIMIT = Metric(
    "loaderd_cache_limit_bytes", "How large downloads may make the cache; absent: no limit."
)
CACHE_FREE = Metric("loaderd_cache_disk_free_bytes", "Free space on the cache's disk.")
CACHE_SNAPSHOTS = Metric("loaderd_cache_snapshots", "Snapshots in the cache.")
DOWNLOADS = Metric("loaderd_downloads", "Downloads under way.")

DEVICE_MEMORY = Metric("loaderd_device_memory_bytes", "Memory of a device.", ("device",))
DEVICE_FREE = Metric(
    "loaderd_device_memory_free_bytes",
    "Memory of a device that is free; of an accelerator when the newest worker had started.",
    ("device",),
)
DEVICE_RESERVED = Metric(
    "loaderd_device_memory_reserved_bytes",
    "Memory of a device that models have reserved or hold.",
    ("device",),
)
DEVICE_TAKEN = Metric(
    "loaderd_device_memory_taken_bytes",
    "Of what is reserved of a device, what loads have really taken.",
    ("device",),
)
