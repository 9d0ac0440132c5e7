"""Exposes metrics under vLLM's names as well, which endpoint pickers and public dashboards read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# Where there are two names for one metric, some endpoint pickers still read the older one.
_VLLM_NAMES = {
    "llm_running": ("vllm:num_requests_running",),
    "llm_waiting": ("vllm:num_requests_waiting",),
    "llm_kv_usage_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "llm_prefix_cache_queries": ("vllm:prefix_cache_queries",),
    "llm_prefix_cache_hits": ("vllm:prefix_cache_hits",),
    "llm_prompt_tokens": ("vllm:prompt_tokens",),
    "llm_generation_tokens": ("vllm:generation_tokens",),
    "llm_preemptions": ("vllm:num_preemptions",),
    "llm_finished": ("vllm:request_success",),
    "llm_queue_time_seconds": ("vllm:request_queue_time_seconds",),
    "llm_prefill_time_seconds": ("vllm:request_prefill_time_seconds",),
    "llm_decode_time_seconds": ("vllm:request_decode_time_seconds",),
    "llm_time_to_first_token_seconds": ("vllm:time_to_first_token_seconds",),
    "llm_inter_token_latency_seconds": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "llm_request_duration_seconds": ("vllm:e2e_request_latency_seconds",),
    "llm_request_prompt_tokens": ("vllm:request_prompt_tokens",),
    "llm_request_generation_tokens": ("vllm:request_generation_tokens",),
    "llm_request_longest_tokens": ("vllm:request_max_num_generation_tokens",),
}
# Endpoint pickers compare prompts block by block, and expect a cache of blocks. This service has positions instead,
# and reuses prompt prefixes of any length from this many tokens on.
_BLOCK = 16


class Cache(Protocol):
    """The size of the KV cache of an engine."""

    @property
    def positions(self) -> int: ...


class VllmNames(Collector):
    """The metrics of other collectors under vLLM's names, and vLLM's metric of the cache configuration."""

    def __init__(self, sources: Sequence[Collector], read: Callable[[], Mapping[str, Cache]]) -> None:
        self._sources = sources
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            for metric in source.collect():
                for name in _VLLM_NAMES.get(metric.name, ()):
                    yield _renamed(metric, name)
        yield self._cache_config()

    def _cache_config(self) -> Metric:
        metric = GaugeMetricFamily("vllm:cache_config_info", "Size of the cache, expressed in blocks.")
        for model, now in self._read().items():
            sizes = {"block_size": str(_BLOCK), "num_gpu_blocks": str(now.positions // _BLOCK)}
            metric.add_sample(metric.name, {"model_name": model, **sizes}, 1)
        return metric


def _renamed(metric: Metric, name: str) -> Metric:
    renamed = Metric(name, metric.documentation, metric.type)
    renamed.samples = [
        Sample(name + sample.name.removeprefix(metric.name), _labels(sample.labels), sample.value)
        for sample in metric.samples
        if not sample.name.endswith("_created")
    ]
    return renamed


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    return {"model_name" if name == "model" else name: value for name, value in labels.items()}
