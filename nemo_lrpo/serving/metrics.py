"""Numbers of a running server in Prometheus' form: its own, and what its scorer counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "lrpo_reward"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class ServerMetrics:
    """The metrics of one server, in a registry of their own. Safe to use from threads."""

    def __init__(self, counts: Callable[[], Mapping[str, float]]) -> None:
        """`counts` gives the scorer's totals, by `name` or `name/label`."""
        self._registry = CollectorRegistry()
        self.latency = Histogram(
            f"{PREFIX}_request_seconds",
            "From the arrival of a score request to its reply, refusals included",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.waited = Histogram(
            f"{PREFIX}_wait_seconds",
            "From the arrival of a score request to the start of scoring",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.requests = Counter(
            f"{PREFIX}_requests", "Messages by kind and outcome", ["kind", "outcome"], registry=self._registry
        )
        self.texts = Counter(f"{PREFIX}_texts", "Answers scored", registry=self._registry)
        self.missing = Counter(f"{PREFIX}_missing", "Answers scored that have no reward", registry=self._registry)
        self.waiting = Gauge(f"{PREFIX}_waiting", "Score requests that wait", registry=self._registry)
        self.in_progress = Gauge(f"{PREFIX}_in_progress", "Score requests being scored", registry=self._registry)
        self._registry.register(_ScorerCollector(counts))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def flat(self) -> dict[str, float]:
        """All samples by name, labels in braces as in the text format; without histogram buckets."""
        samples = (sample for metric in self._registry.collect() for sample in metric.samples)
        flat = {}
        for sample in samples:
            if not sample.name.endswith(("_bucket", "_created")):
                labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                flat[f"{sample.name}{{{labels}}}" if labels else sample.name] = float(sample.value)
        return flat


class _ScorerCollector(Collector):
    """`name/label` becomes `lrpo_reward_<name>_total{label="..."}`; batch fill and cache hit rate follow from them."""

    def __init__(self, counts: Callable[[], Mapping[str, float]]) -> None:
        self._counts = counts

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape; without this, registering would call the scorer."""
        return []

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        counts = dict(self._counts())
        families: dict[str, CounterMetricFamily] = {}
        for key, value in sorted(counts.items()):
            name, _, label = key.partition("/")
            name = f"{PREFIX}_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}"
            family = families.setdefault(name, CounterMetricFamily(name, f"Total {name}", labels=["label"]))
            family.add_metric([label], value)
        yield from families.values()
        yield _ratio(
            "batch_fill", "Real tokens per token that the encoder's batches can hold", counts,
            [(counts.get("encoder_tokens", 0.0), counts.get("encoder_capacity_tokens", 0.0), "")],
        )  # fmt: skip
        hits = {key.partition("/")[2]: value for key, value in counts.items() if key.startswith("cache_hits/")}
        yield _ratio(
            "cache_hit_rate", "Embeddings found in the cache, by role", counts,
            [(hit, hit + counts.get(f"cache_misses/{role}", 0.0), role) for role, hit in sorted(hits.items())],
        )  # fmt: skip


def _ratio(
    name: str, description: str, counts: Mapping[str, float], ratios: list[tuple[float, float, str]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", description, labels=["label"])
    for numerator, denominator, label in ratios:
        if denominator > 0:
            family.add_metric([label], numerator / denominator)
    return family
