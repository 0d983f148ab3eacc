"""A server's metrics in Prometheus' text format, by its official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from .host import Host


class Exposition:
    """A registry of the server's own. Thread-safe."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, host: Host) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_HostCollector(host))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """As it is now."""
        return generate_latest(self._registry)


class _HostCollector(Collector):
    def __init__(self, host: Host) -> None:
        self._host = host

    def describe(self) -> Iterator[Metric]:
        return iter(())  # nobody else is in this registry but the process

    def collect(self) -> Iterator[Metric]:
        told = self._host.health()
        about = {key: str(told[key]) for key in ("version", "isolation", "name")}
        yield InfoMetricFamily("slotpool_server", "The server.", value=about)
        slots = GaugeMetricFamily("slotpool_server_slots", "Slots by state.", labels=["state"])
        for state, count in told["counts"].items():
            slots.add_metric([state], count)
        yield slots
        yield GaugeMetricFamily("slotpool_server_leases_waiting", "Leases that open requests wait for.", value=told["waiting"])
        tally = self._host.tally
        with tally.lock:
            metrics = list(self._counted())
        yield from metrics

    def _counted(self) -> Iterator[Metric]:
        """With the tally's lock held."""
        tally = self._host.tally
        yield CounterMetricFamily("slotpool_server_leases_granted", "Leases granted.", value=tally.leases_granted)
        ended = CounterMetricFamily("slotpool_server_leases_ended", "Leases that ended, by reason.", labels=["reason"])
        for reason, count in tally.leases_ended.items():
            ended.add_metric([reason], count)
        yield ended
        executions = CounterMetricFamily(
            "slotpool_server_executions", "Executions that ended, by tool and outcome.", labels=["tool", "outcome"]
        )
        for labels, count in sorted(tally.ended.items()):
            executions.add_metric(labels, count)
        yield executions
        yield GaugeMetricFamily("slotpool_server_executions_running", "Executions under way.", value=tally.executing)
        for name, told, histogram in (
            ("slotpool_server_execution_duration_seconds", "How long executions took.", tally.durations),
            ("slotpool_server_cleaning_duration_seconds", "How long making a slot ready took.", tally.cleanings),
        ):
            yield HistogramMetricFamily(name, told, histogram.buckets(), histogram.sum)
        yield CounterMetricFamily(
            "slotpool_server_cleaning_failures", "Slots that could not be made ready.", value=tally.cleaning_failures
        )
        yield CounterMetricFamily("slotpool_server_requests", "Requests that came.", value=tally.requests)
        yield GaugeMetricFamily("slotpool_server_requests_open", "Requests being answered.", value=tally.requests_open)
