"""What Prometheus is told, of pools and by servers."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
from conftest import PACKAGE, StartServer
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from slotpool import SlotPool
from slotpool.errors import InvalidRequest
from slotpool.metrics import PoolCollector
from slotpool.view import look

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    """The samples; checks the names by Prometheus' conventions."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        assert not any(word in family.name for word in ("_ms", "milli", "_count", "_sum", "_bucket")), family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_a_pool_from_start_to_end(pool: SlotPool) -> None:
    registry = CollectorRegistry(auto_describe=True)
    collector = PoolCollector(pool, "a")
    registry.register(collector)
    with pytest.raises(ValueError, match="slotpool_slots"):
        registry.register(PoolCollector(pool, "again"))
    other = SlotPool()
    collector.add(other)
    with pytest.raises(InvalidRequest, match="name"):
        collector.add(other, "a")

    def scraped() -> Samples:
        return parsed(generate_latest(registry).decode())

    with pool.slot() as s:
        s.bash("true")
        told = scraped()
        assert value(told, "slotpool_slots", pool="a", state="acquired") == 1
        assert sum(n for (name, labels), n in told.items() if name == "slotpool_slots" and ("pool", "a") in labels) == 4
        assert value(told, "slotpool_executions_total", pool="a") == 1
        assert value(told, "slotpool_containers", pool="a") == 1
        assert value(told, "slotpool_containers", pool="local") == 0
    del other
    gc.collect()
    pool.stop()
    told = scraped()
    assert value(told, "slotpool_containers", pool="a") == 0
    assert value(told, "slotpool_executions_total", pool="a") == 1
    assert value(told, "slotpool_slot_usage_seconds_total", pool="a") > 0
    assert ("slotpool_containers", frozenset({("pool", "local")})) not in told


def test_a_view_is_of_one_moment(pool: SlotPool) -> None:
    with pool.slot(), pool.slot():
        view = look(pool)
        (container,) = view.containers
        assert (container.acquired, container.executing, view.waiting, view.lost) == (2, 0, 0, 0)
        assert container.acquired + container.ready + container.free == container.slots == 4


def test_a_server_counts_what_it_does(start_server: StartServer) -> None:
    server = start_server("none", slots=2)

    def scraped() -> Samples:
        status, text = server.client._http.request("GET", "/metrics", None, 10)[:2]
        assert status == 200
        assert server.token not in text.decode()
        return parsed(text.decode())

    (lease,) = server.lease(ttl=30)
    server.bash(lease, "true")
    server.bash(lease, "exit 3")
    server.bash(lease, "sleep 100", timeout=0.2)
    told = scraped()
    for outcome in ("succeeded", "failed", "timed_out"):
        assert value(told, "slotpool_server_executions_total", tool="bash", outcome=outcome) == 1, outcome
    assert value(told, "slotpool_server_execution_duration_seconds_count") == 3
    assert value(told, "slotpool_server_execution_duration_seconds_bucket", le="+Inf") == 3
    assert value(told, "slotpool_server_executions_running") == 0
    assert value(told, "slotpool_server_leases_granted_total") == 1
    assert value(told, "slotpool_server_slots", state="leased") == 1
    assert value(told, "slotpool_server_requests_open") == 1
    assert value(told, "slotpool_server_leases_waiting") == 0
    assert value(told, "process_resident_memory_bytes") > 0
    server.client.lease("test", 30, 0, release=[lease["token"]])
    server.lease(ttl=0.1)
    assert server.free(2)
    told = scraped()
    assert value(told, "slotpool_server_leases_ended_total", reason="released") == 1
    assert value(told, "slotpool_server_leases_ended_total", reason="expired") == 1
    assert value(told, "slotpool_server_cleaning_duration_seconds_count") == 4
    assert lease["token"] not in str(told)


def test_metrics_need_the_token(start_server: StartServer) -> None:
    from slotpool.sandbox.client import SandboxClient

    server = start_server("none")
    stranger = SandboxClient(server.address)
    assert stranger._http.request("GET", "/metrics", None, 10)[0] == 401
    stranger.close()


def test_without_prometheus_client_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import slotpool.pool\nimport slotpool.metrics"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env={"PYTHONPATH": PACKAGE}, capture_output=True, text=True, check=False
    )
    assert "pip install 'slotpool[metrics]'" in done.stderr
