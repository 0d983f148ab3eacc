"""Metrics of pools for `Prometheus <https://prometheus.io>`_, by its official client.

>>> from prometheus_client import REGISTRY
>>> REGISTRY.register(PoolCollector(pool))  # doctest: +SKIP
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import InvalidRequest, shown
from .view import PoolView, look

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as e:
    raise ImportError("slotpool.metrics needs prometheus_client: pip install 'slotpool[metrics]'") from e

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from .pool import SlotPool

_COUNTERS = {  # the field of Counters, and its unit in the metric's
    "slotpool_requests": ("requests_num", 1, "Slots asked for."),
    "slotpool_requests_queued": ("requests_queued", 1, "Slots asked for that were not there at once."),
    "slotpool_request_wait_seconds": ("requests_wait_ms", 1e-3, "Time that callers waited who then got a slot."),
    "slotpool_request_errors": ("requests_errors", 1, "Slots asked for and not had: time-outs, interrupts, a stopped pool."),
    "slotpool_slot_usage_seconds": ("usage_ms", 1e-3, "Time that slots were held by callers who have given them back."),
    "slotpool_slot_bad_returns": ("returns_bad", 1, "Slots given back after their lease was lost."),
    "slotpool_executions": ("executions_num", 1, "Commands and tools asked for."),
    "slotpool_execution_errors": ("executions_errors", 1, "Commands and tools that gave no result of their own."),
    "slotpool_leases": ("leases_num", 1, "Leases taken from servers."),
    "slotpool_leases_lost": ("leases_lost", 1, "Leases that ended before they were given back."),
    "slotpool_slots_abandoned": ("slots_abandoned", 1, "Slots dropped without being released."),
    "slotpool_containers_lost": ("containers_lost", 1, "Containers that ended or went silent without being asked to."),
    "slotpool_scale_ups": ("scale_ups", 1, "Times that demand asked for more containers."),
    "slotpool_scale_downs": ("scale_downs", 1, "Times that containers were ended for lack of demand."),
    "slotpool_scale_errors": ("scale_errors", 1, "Scalings that were refused."),
}


class PoolCollector(Collector):
    """What pools do and have done, at the moment of each scrape. Thread-safe; costs no request.

    A pool is not kept alive by it; one that was collected is told of no more. Of one that is stopped there are its last
    counters, and no containers. A registry takes one collector: :meth:`add` further pools to it.

    :param pool: the first one.
    :param name: its label ``pool``; default the ``job_id`` of a pool on a cluster, else its backend, ``local`` or ``static``.
    """

    def __init__(self, pool: SlotPool, name: str | None = None) -> None:
        self._lock = threading.Lock()  # guards the table of pools
        self._pools: dict[str, weakref.ref[SlotPool]] = {}
        self.add(pool, name)

    def add(self, pool: SlotPool, name: str | None = None) -> None:
        """Tell of one more pool.

        :param name: as above.
        :raises InvalidRequest: another pool that is still there has that name.
        """
        if name is None:
            name = pool.config.job_id if pool.config.backend == "nomad" else pool.config.backend
        with self._lock:
            known = self._pools.get(name)
            if known is not None and known() not in (None, pool):
                raise InvalidRequest("name", "a name that no other pool has", shown(name))
            self._pools[name] = weakref.ref(pool)

    def describe(self) -> Iterator[Metric]:
        """The metrics without values."""
        return _metrics({})

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        with self._lock:
            pools = {name: reference() for name, reference in self._pools.items()}
            self._pools = {name: self._pools[name] for name, pool in pools.items() if pool is not None}
        return _metrics({name: look(pool) for name, pool in pools.items() if pool is not None})


def _metrics(views: dict[str, PoolView]) -> Iterator[Metric]:
    slots = GaugeMetricFamily("slotpool_slots", "Slots of the containers that are there, by state.", labels=["pool", "state"])
    containers = GaugeMetricFamily("slotpool_containers", "Containers that are there.", labels=["pool"])
    waiting = GaugeMetricFamily("slotpool_requests_waiting", "Callers that wait for a slot.", labels=["pool"])
    lost = GaugeMetricFamily("slotpool_slots_lost", "Slots that callers hold though the lease is lost.", labels=["pool"])
    for name, view in views.items():
        executing = view.total("executing")
        slots.add_metric([name, "acquired"], view.total("acquired") - executing)
        slots.add_metric([name, "executing"], executing)
        for state in ("ready", "leased_by_others", "quarantined", "free"):
            slots.add_metric([name, state], view.total(state))
        containers.add_metric([name], len(view.containers))
        waiting.add_metric([name], view.waiting)
        lost.add_metric([name], view.lost)
    yield from (slots, containers, waiting, lost)
    for metric, (field, unit, told) in _COUNTERS.items():
        counter = CounterMetricFamily(metric, told, labels=["pool"])
        for name, view in views.items():
            counter.add_metric([name], getattr(view.counters, field) * unit)
        yield counter
