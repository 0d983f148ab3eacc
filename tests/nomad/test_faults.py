"""What happens to a cluster while leases are held; on real agents, a real Docker engine, a cluster in network namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, Cluster, why_no_cluster, why_no_nomad
from conftest import PACKAGE, wait_until
from nomads import Nomad, acquire_at_once

from slotpool import Slot, SlotPool
from slotpool.errors import SlotError

README = (Path(__file__).resolve().parents[2] / "README.rst").read_text()


def works(slot: Slot) -> bool:
    return slot.bash("echo well").stdout == "well\n"


def lost(slot: Slot) -> None:
    """The holder learns of it by a typed error, and keeps learning it."""
    for _ in range(2):
        with pytest.raises(SlotError):
            slot.bash("sleep 1000", timeout=60)
    slot.release()


@pytest.fixture
def contained(docker: None, real: Nomad, sandbox_image: str) -> dict[str, Any]:
    """Settings of a pool whose containers are Docker's."""
    return real.settings(driver="docker", image=sandbox_image, memory=128, env={})


def test_docker_containers_isolate_by_user_and_are_unprivileged(contained: dict[str, Any]) -> None:
    with SlotPool(**contained) as pool, pool.slot() as one, pool.slot() as other:
        assert pool.get_stats()["isolation"] == ["user"]
        one.write_file("secret", "mine")
        assert one.bash("id -u").stdout not in ("0\n", other.bash("id -u").stdout)
        assert other.bash(f"cat {one.workspace_dir}/secret").exit_code != 0
        assert other.bash("cat /secrets/token /proc/1/environ").stdout == ""
        for command in ("git", "curl", "jq", "tmux", "rg", "python3"):
            assert one.bash(f"command -v {command}").success, command


def test_a_container_that_docker_kills(contained: dict[str, Any], real: Nomad) -> None:
    with SlotPool(**contained) as pool:
        s = pool.acquire(timeout=30)
        names = subprocess.run(["docker", "ps", "--format", "{{.Names}}"], check=True, capture_output=True, text=True).stdout
        (name,) = [name for name in names.split() if s.alloc_id in name]
        subprocess.run(["docker", "kill", name], check=True, capture_output=True)
        lost(s)
        with pool.slot(timeout=60) as s:
            assert works(s)
        assert wait_until(lambda: pool.total_slots == 2)


@pytest.mark.parametrize("hard", [False, True])
def test_an_agent_that_restarts_disturbs_no_lease(hard: bool) -> None:
    why_not = why_no_nomad()
    if why_not:
        pytest.skip(why_not)
    with Agent() as agent:
        nomad = Nomad(agent.address, agent.api)
        with nomad.pool(max_containers=2) as pool:
            held = [pool.acquire(timeout=30) for _ in range(2)]
            agent.restart(hard)
            assert all(works(s) for s in held)
            with pool.slot(timeout=60) as another:  # by a scale-up after the restart
                assert works(another)
            assert all(works(s) for s in held)
        nomad.purge()


def test_a_node_that_is_drained_and_comes_back(real: Nomad) -> None:
    node = real.node()
    with real.pool() as pool:
        s = pool.acquire(timeout=30)
        real.api("POST", f"/v1/node/{node}/drain", {"DrainSpec": {"Deadline": 1_000_000_000}})
        lost(s)
        real.api("POST", f"/v1/node/{node}/drain", {"DrainSpec": None, "MarkEligible": True})
        with pool.slot(timeout=60) as s:
            assert works(s)


def test_a_port_that_another_server_has_taken_over(real: Nomad) -> None:
    """One with the same bearer token, as another allocation of the job has."""
    with real.pool() as pool:
        s = pool.acquire(timeout=30)
        s.write_file("mine", "secret")
        host, _, port = s.container_addr.rpartition("//")[2].rpartition(":")
        token = real.api("GET", f"/v1/var/nomad/jobs/{pool.config.job_id}")["Items"]["token"]
        os.kill(real.pid_of(s.alloc_id), signal.SIGKILL)
        impostor = subprocess.Popen(
            [sys.executable, "-m", "slotpool", "serve", "--host", host, "--port", port, "--slots", "1", "--name", "another"],
            env={**os.environ, "PYTHONPATH": PACKAGE, "SLOTPOOL_TOKEN": token},
            stdout=subprocess.PIPE,
        )
        assert impostor.stdout is not None
        try:
            assert impostor.stdout.readline().startswith(b"http://")
            lost(s)
        finally:
            impostor.terminate()
            impostor.communicate(timeout=30)
        with pool.slot(timeout=60) as s:
            assert s.bash("ls -A; echo well").stdout == "well\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    why_not = why_no_nomad() or why_no_cluster()
    if why_not:
        pytest.skip(why_not)
    with Cluster() as started:
        yield started


def test_a_cluster_spreads_leases_and_a_client_that_is_cut_off_and_healed(cluster: Cluster) -> None:
    nomad = Nomad(cluster.address, cluster.api)
    settings = nomad.settings(slots_per_container=2, min_containers=3, max_containers=3, lease_ttl=4.0)
    with SlotPool(**settings) as pool:
        held = [pool.acquire(timeout=60) for _ in range(6)]
        places = {one["ID"]: cluster.index(one["NodeID"]) for one in nomad.running(settings["job_id"])}
        assert sorted(places.values()) == [0, 1, 2]
        cut = places[held[0].alloc_id]
        cluster.cut(cut)
        inside = [s for s in held if places[s.alloc_id] == cut]
        outside = [s for s in held if places[s.alloc_id] != cut]
        try:
            for s in inside:
                lost(s)
            assert all(works(s) for s in outside)
            again = [pool.acquire(timeout=60) for _ in inside]
            assert all(works(s) for s in again)
            assert all(s.bash("ls -A").stdout == "" for s in again)
        finally:
            cluster.heal(cut)
        cluster.wait_status(cut, "ready")
        assert all(works(s) for s in (*outside, *again))
        assert wait_until(lambda: pool.total_slots == 6, 30)
    nomad.purge()


def test_one_to_five_to_one_with_leases_held_throughout(real: Nomad) -> None:
    with real.pool(slots_per_container=1, max_containers=5, scale_down_after=0.3) as pool:
        job = pool.config.job_id
        first = pool.acquire(timeout=30)
        first.bash("echo kept > file; sleep 10000 &")
        more = acquire_at_once(pool, 4)
        assert real.count(job) == 5
        assert all(works(s) for s in more)
        for s in more:
            s.release()
        assert wait_until(lambda: real.count(job) == 1, 30)
        assert first.bash("cat file; pgrep -c sleep").stdout == "kept\n1\n"


def test_the_readmes_code_runs(docker: None, agent: Agent, sandbox_image: str, capsys: pytest.CaptureFixture[str]) -> None:
    section = README.partition(":class: nomad")[2].partition("**Sharing.**")[0]
    code = textwrap.dedent(section).replace("http://127.0.0.1:4646", agent.address)
    assert agent.address in code

    class Pool(SlotPool):
        """With an image that this test has built."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(image=sandbox_image, **settings)

    exec(compile(code, "README.rst", "exec"), {"SlotPool": Pool})
    assert capsys.readouterr().out not in ("", "0\n")
