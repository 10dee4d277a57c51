"""Metrics of the web process, and the page that Prometheus reads. One registry per app.

Labels have few values always: route templates, never paths.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Protocol

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from commands.command import Command
from commands.executor import BATCH_MAX, QUEUE_MAX

# Seconds. The marks of the latency goals stand in it; above 10 s nobody waits.
REQUEST_BUCKETS_S: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
BATCH_BUCKETS: Final = tuple(2**power for power in range(BATCH_MAX.bit_length()))

Numbers = Callable[[], Mapping[str, float]]
"""Label value to number, asked at each scrape."""

Family = type[CounterMetricFamily] | type[GaugeMetricFamily]


class Metrics:
    """What the web process counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "waybill_http_request_seconds",
            "Requests by route template, method and status.",
            ("route", "method", "status"),
            buckets=REQUEST_BUCKETS_S,
            registry=self.registry,
        )
        # labels() costs more than observe(); routes x methods x statuses is a few hundred, since
        # the edge lets no other label in.
        self._by_labels: dict[tuple[str, str, int], Histogram] = {}
        self.limited = Counter(
            "waybill_http_rate_limited_total", "Requests answered 429.", registry=self.registry
        )
        self.shed = Counter(
            "waybill_http_shed_total",
            "Requests answered 503 because there is too much to do, by what was full.",
            ("full",),
            registry=self.registry,
        )
        self.unleased = Counter(
            "waybill_http_unleased_shares_total",
            "Shares of a quota that reads took without a lease while PostgreSQL was away.",
            registry=self.registry,
        )
        self.projection_lag = Gauge(
            "waybill_projection_lag_seconds",
            "How far each read model is behind the commands.",
            ("read_model",),
            registry=self.registry,
        )
        self._batch_sizes = Histogram(
            "waybill_command_batch_size",
            "Commands per transaction.",
            ("command",),
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self._batch_seconds = Histogram(
            "waybill_command_batch_seconds",
            "Seconds per transaction of commands.",
            ("command",),
            buckets=REQUEST_BUCKETS_S,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(PLATFORM_COLLECTOR)
        self.registry.register(GC_COLLECTOR)

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        labels = (route, method, status)
        child = self._by_labels.get(labels)
        if child is None:
            child = self._by_labels[labels] = self._requests.labels(route, method, str(status))
        child.observe(seconds)

    def batch_observer(self, command: type[Command]) -> Callable[[int, float], None]:
        """Return what an executor calls with the size and the seconds of each batch."""
        sizes = self._batch_sizes.labels(command_name(command))
        durations = self._batch_seconds.labels(command_name(command))

        def observe(size: int, seconds: float) -> None:
            sizes.observe(size)
            durations.observe(seconds)

        return observe

    def show(self, family: Family, name: str, text: str, label: str, numbers: Numbers) -> None:
        """Show what somebody else counts, under one label."""
        self.registry.register(_Shown(lambda: family(name, text, labels=(label,)), numbers))

    def show_queues(self, queues: Mapping[type[Command], "Queue"]) -> None:
        """Show how many commands wait."""
        self.show(
            GaugeMetricFamily,
            "waybill_command_queue",
            f"Commands waiting; the next one is answered 503 at {QUEUE_MAX}.",
            "command",
            lambda: {command_name(kind): queue.waiting for kind, queue in queues.items()},
        )

    def show_pools(self, pools: Mapping[str, "Pool"]) -> None:
        """Show connections of each pool, open and idle."""
        self.show(
            GaugeMetricFamily,
            "waybill_pool_open_connections",
            "Connections to PostgreSQL.",
            "pool",
            lambda: {name: pool.get_size() for name, pool in pools.items()},
        )
        self.show(
            GaugeMetricFamily,
            "waybill_pool_idle_connections",
            "Connections to PostgreSQL that nobody uses.",
            "pool",
            lambda: {name: pool.get_idle_size() for name, pool in pools.items()},
        )

    def page(self, *, is_one_of_many: bool) -> bytes:
        """The exposition. Of several processes on one port each scrape meets another one.

        So theirs have a label `process`, without which their counters would seem to jump.
        """
        return generate_latest(_OneOfMany(self.registry) if is_one_of_many else self.registry)


class Queue(Protocol):
    """What is shown of an executor."""

    @property
    def waiting(self) -> int: ...


class Pool(Protocol):
    """What is shown of a pool of connections."""

    def get_size(self) -> int: ...
    def get_idle_size(self) -> int: ...


def command_name(command: type[Command]) -> str:
    """`PlaceOrder` is `place_order`, as its file is."""
    return "".join(f"_{each.lower()}" if each.isupper() else each for each in command.__name__)[1:]


class _Shown(Collector):
    """Numbers that are asked for at each scrape."""

    def __init__(
        self, family: Callable[[], CounterMetricFamily | GaugeMetricFamily], numbers: Numbers
    ) -> None:
        self._family = family
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        for value, number in self._numbers().items():
            family.add_metric([value], number)
        yield family


class _OneOfMany(Collector):
    """The samples of a registry, labelled with this process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        process = str(os.getpid())
        for family in self._registry.collect():
            family.samples = [
                sample._replace(labels={**sample.labels, "process": process})
                for sample in family.samples
            ]
            yield family
