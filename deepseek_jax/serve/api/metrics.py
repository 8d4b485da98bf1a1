"""What a monitor reads from GET /metrics, in Prometheus' text format.

Times are those of the server: from a request's arrival to its first token, and from there to its last, per token. Names
end in their units, as Prometheus asks.
"""

from collections.abc import Iterator
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deepseek_jax.serve.api.answers import Usage
from deepseek_jax.serve.loads import ExpertLoads
from deepseek_jax.serve.worker import Worker

FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)
PREFIX = "deepseek_jax_"


class Metrics:
    """The numbers of one server."""

    def __init__(self, worker: Worker, loads: ExpertLoads):
        self.registry = CollectorRegistry()
        self.registry.register(_State(worker, loads))
        self.responses = self._counter("http_responses", "Responses by route and status.", ("route", "status"))
        self.endings = self._counter("completions", "Choices by the reason for which they ended.", ("reason",))
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached = self._counter("cached_prompt_tokens", "Tokens of prompts that the cache had.")
        self.completion = self._counter("completion_tokens", "Tokens of answers, thoughts included.")
        self.first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_S)
        self.each = self._histogram("time_per_output_token_seconds", "Between tokens after the first.", TOKEN_S)

    def text(self) -> bytes:
        """Returns all of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def clock(self) -> "Clock":
        """Returns a clock for a choice, which starts now."""
        return Clock(self)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)


class Clock:
    """Measures one choice from its arrival to its end, however that is."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._arrived = metrics, monotonic()
        self._first: float | None = None

    def token(self) -> None:
        """Notes that tokens have come."""
        if self._first is None:
            self._first = monotonic()
            self._metrics.first.observe(self._first - self._arrived)

    def end(self, usage: Usage, reason: str) -> None:
        """Counts what was computed; no reason stands for a client that left or an engine that failed."""
        metrics = self._metrics
        metrics.endings.labels(reason or "unfinished").inc()
        metrics.prompt.inc(usage.prompt)
        metrics.cached.inc(usage.cached)
        metrics.completion.inc(usage.completion)
        if self._first is not None and usage.completion > 1:
            metrics.each.observe((monotonic() - self._first) / (usage.completion - 1))


class _State(Collector):
    """What the engine is doing at the moment of reading."""

    def __init__(self, worker: Worker, loads: ExpertLoads):
        self._worker, self._loads = worker, loads

    def collect(self) -> Iterator[Metric]:
        engine, ranks = self._worker.engine, self._worker.engine.ranks
        yield self._gauge("alive", "1 while requests are accepted.", int(self._worker.is_alive))
        yield self._gauge("requests_open", "Requests that run, wait or are being read.", self._worker.n_open)
        yield self._gauge("requests_running", "Requests that run.", sum(len(rank.scheduler.running) for rank in ranks))
        yield self._gauge("pages", "Pages of the cache.", sum(rank.pages.n_pages - 1 for rank in ranks))
        yield self._gauge("pages_free", "Pages that no request holds.", sum(rank.pages.n_free for rank in ranks))
        text = "Load of the fullest expert over the mean, when /experts was read last."
        fullest = GaugeMetricFamily(PREFIX + "fullest_expert", text, labels=["layer"])
        for layer in self._loads.layers:
            fullest.add_metric([layer.name], layer.fullest)
        yield fullest
        yield CounterMetricFamily(PREFIX + "drafts", "Drafts of tokens that were verified.", engine.n_drafted)
        yield CounterMetricFamily(PREFIX + "drafts_accepted", "Those that were right.", engine.n_accepted)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        return GaugeMetricFamily(PREFIX + name, text, value)
