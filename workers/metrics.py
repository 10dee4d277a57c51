"""What the worker counts, for Prometheus. Lag is counted from the events, so a dead loop shows."""

from collections.abc import Iterable, Sequence
from typing import Final

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

from projections.engine import Applied
from projections.status import Status

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
EVENTS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class WorkerMetrics:
    """The numbers of one worker process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lag = Gauge(
            "waybill_projection_lag_seconds",
            "Age of the oldest event that is committed and not yet applied.",
            ("read_model",),
            registry=self.registry,
        )
        self._behind = Gauge(
            "waybill_projection_events_behind",
            "Events that are committed and not yet applied.",
            ("read_model",),
            registry=self.registry,
        )
        self._parked = Gauge(
            "waybill_projection_parked",
            "Aggregates that wait because of an event that cannot be applied.",
            ("read_model",),
            registry=self.registry,
        )
        self._events = Counter(
            "waybill_projection_events",
            "Events in the batches of this worker.",
            ("read_model",),
            registry=self.registry,
        )
        self._sizes = Histogram(
            "waybill_projection_batch_events",
            "Events per batch.",
            buckets=EVENTS,
            registry=self.registry,
        )
        self._durations = Histogram(
            "waybill_projection_batch_seconds",
            "Seconds per turn, with its commit.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._visible = Histogram(
            "waybill_projection_visible_seconds",
            "Seconds from the oldest event of a batch to its visibility in the read models.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.pushes_failed = Counter(
            "waybill_projection_pushes_failed",
            "Turns that readers could not be told of.",
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(PLATFORM_COLLECTOR)
        self.registry.register(GC_COLLECTOR)

    def observe(self, applied: Sequence[Applied], *, seconds: float, now_s: float) -> None:
        """Count a turn that is committed; `now_s` since 1970."""
        self._durations.observe(seconds)
        for each in applied:
            if each.is_again or each.batch is None or not each.batch.events:
                continue
            self._sizes.observe(each.batch.events)
            for model in each.models:
                self._events.labels(model).inc(each.batch.events)
            if each.batch.oldest is not None:
                self._visible.observe(max(0.0, now_s - each.batch.oldest.timestamp()))

    def show(self, statuses: Iterable[Status]) -> None:
        """Show how far the read models are, whoever projects them."""
        for status in statuses:
            self._lag.labels(status.read_model).set(status.lag_s)
            self._behind.labels(status.read_model).set(status.events_behind)
            self._parked.labels(status.read_model).set(status.parked)
