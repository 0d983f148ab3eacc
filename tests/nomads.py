"""Nomad for the tests: a real agent where there is one, and the fake beside it, so that the same suite runs on both."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest
import requests
from agents import Agent, why_no_docker, why_no_nomad
from fake_nomad import FakeNomad

import slotpool
from slotpool import Slot, SlotPool

PACKAGE = str(Path(slotpool.__file__).resolve().parents[1])

_serial = itertools.count()


def acquire_at_once(pool: SlotPool, count: int) -> list[Slot]:
    """Slots for so many callers, each in a thread."""
    with ThreadPoolExecutor(count) as callers:
        return list(callers.map(lambda _: pool.acquire(timeout=60), range(count)))


class Nomad:
    """Where jobs run.

    :ivar address: of the HTTP API.
    :ivar fake: the fake with its levers, if it is one.
    """

    def __init__(self, address: str, api: Callable[..., Any], fake: FakeNomad | None = None) -> None:
        self.address = address
        self.api = api
        self.fake = fake
        self.jobs: list[str] = []

    def new_job(self) -> str:
        self.jobs.append(f"test-{os.getpid()}-{next(_serial)}")
        return self.jobs[-1]

    def settings(self, **more: Any) -> dict[str, Any]:
        """Of a pool with a job of its own, small and quick, its servers right on the node."""
        return {
            "nomad_address": self.address,
            "job_id": self.new_job(),
            "driver": "raw_exec",
            "slots_per_container": 2,
            "cpu": 20,
            "memory": 64,  # MB; the kernel ends a server that needs more
            "health_check_interval": 0.5,
            "env": {"PYTHONPATH": PACKAGE},
            **more,
        }

    def pool(self, **more: Any) -> SlotPool:
        return SlotPool(**self.settings(**more))

    def running(self, job_id: str) -> list[dict[str, Any]]:
        """Its allocations that are to run, lowest index first. Nomad tells up to a second late that they do."""
        found = self.api("GET", f"/v1/job/{job_id}/allocations")
        found = [one for one in found if one["DesiredStatus"] == "run" and one["ClientStatus"] in ("pending", "running")]
        return sorted(found, key=lambda one: int(one["Name"].rpartition("[")[2][:-1]))

    def node(self) -> str:
        """The id of its first node."""
        return str(self.api("GET", "/v1/nodes")[0]["ID"])

    def count(self, job_id: str) -> int:
        return int(self.api("GET", f"/v1/job/{job_id}")["TaskGroups"][0]["Count"])

    def purge(self) -> None:
        for job_id in self.jobs:
            with contextlib.suppress(Exception):  # it has never been registered
                self.api("DELETE", f"/v1/job/{job_id}?purge=true")
        self.jobs.clear()

    def running_anything(self, job_id: str) -> bool:
        found = self.api("GET", f"/v1/job/{job_id}/allocations")
        return any(one["ClientStatus"] in ("pending", "running") for one in found)

    def pid_of(self, allocation_id: str) -> int:
        """The server's process, not one that it forked: their numbers need not follow its own."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                stat = (path / "stat").read_text()
            except OSError:
                continue
            if b"serve" in words and allocation_id.encode() in words:
                parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
        for pid, parent in parents.items():
            if parent not in parents:
                return pid
        raise AssertionError(f"there is no server of {allocation_id}")


@pytest.fixture(scope="session")
def agent() -> Iterator[Agent]:
    """A real agent, for whoever needs one and not the fake."""
    why_not = why_no_nomad()
    if why_not:
        pytest.skip(why_not)
    with Agent() as started:
        yield started


@pytest.fixture
def real(agent: Agent) -> Iterator[Nomad]:
    nomad = Nomad(agent.address, agent.api)
    yield nomad
    nomad.purge()


@pytest.fixture(params=["agent", "fake"])
def nomad(request: pytest.FixtureRequest) -> Iterator[Nomad]:
    """The real one, and the fake."""
    if request.param == "agent":
        yield request.getfixturevalue("real")
        return
    with FakeNomad(nodes=1) as fake:
        yield Nomad(fake.address, functools.partial(_api, fake.address), fake)


def _api(address: str, method: str, path: str, body: Any = None) -> Any:
    response = requests.request(method, address + path, json=body, timeout=30)
    response.raise_for_status()
    return response.json() if response.content else None


@pytest.fixture
def docker() -> None:
    why_not = why_no_docker()
    if why_not:
        pytest.skip(why_not)
