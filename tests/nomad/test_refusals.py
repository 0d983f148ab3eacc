"""What keeps a pool from its containers is found early, named as what it is, and says what to do."""

from __future__ import annotations

import os
import re
import signal
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, why_no_nomad
from nomads import Nomad

from slotpool import AcquireTimeout, SlotPool, SlotPoolError
from slotpool.errors import (
    ConfigError,
    CrashLoop,
    ImageUnavailable,
    NomadDenied,
    NomadError,
    NomadUnreachable,
    PlacementFailed,
    StartFailed,
)
from slotpool.fleet.nomad.client import NomadClient
from slotpool.fleet.nomad.connection import Connection


def refused(kind: type[SlotPoolError], **settings: Any) -> str:
    with pytest.raises(kind) as raised, SlotPool(**settings, start_timeout=60):
        pass
    return str(raised.value)


def test_nothing_listens_there() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    told = refused(NomadUnreachable, nomad_address=address, driver="raw_exec")
    assert address in told
    assert "nomad agent -dev" in told


def test_a_server_that_ends_each_time(nomad: Nomad) -> None:
    told = refused(CrashLoop, **nomad.settings(server_command=["python3", "-c", "import sys; sys.exit('no luck today')"]))
    assert "nomad alloc logs -stderr" in told
    assert "no luck today" in told


def test_a_command_that_is_not_there(nomad: Nomad) -> None:
    told = refused(CrashLoop, **nomad.settings(server_command=["/nowhere/python", "-m", "slotpool", "serve"]))
    assert "/nowhere/python" in told


def test_no_room(nomad: Nomad) -> None:
    if nomad.fake:
        nomad.fake.no_room("memory")
    told = refused(PlacementFailed, **nomad.settings(memory=50_000_000))
    assert "memory is used up on 1 node(s)" in told


def test_no_room_for_more(real: Nomad) -> None:
    whole = sum(node["NodeResources"]["Memory"]["MemoryMB"] for node in [real.api("GET", "/v1/node/" + real.node())])
    with real.pool(memory=int(whole * 0.6), slots_per_container=1, max_containers=2) as pool:
        held = pool.acquire(timeout=30)
        with pytest.raises(AcquireTimeout, match=r"1 container\(s\) find no node: memory"):
            pool.acquire(timeout=3)
        assert held.bash("echo well").stdout == "well\n"


def test_no_node_in_that_datacenter(nomad: Nomad) -> None:
    told = refused(PlacementFailed, **nomad.settings(datacenter="nowhere"))
    assert "no node" in told


def test_a_driver_that_no_node_has(nomad: Nomad) -> None:
    if nomad.fake:
        nomad.fake.missing_driver()
    told = refused(PlacementFailed, **nomad.settings(driver="podman", image="x"))
    assert "driver is missing on 1 node(s)" in told


def test_a_constraint_that_no_node_meets(nomad: Nomad) -> None:
    told = refused(PlacementFailed, **nomad.settings(constraints=[("${attr.kernel.name}", "=", "plan9")]))
    assert "plan9" in told


def test_an_image_that_can_not_be_had(real: Nomad, docker: None) -> None:
    settings = real.settings(driver="docker", image="slotpool-test-nowhere:1", memory=64)
    told = refused(ImageUnavailable, **settings)
    assert "slotpool-test-nowhere:1" in told


def test_an_unknown_namespace(nomad: Nomad) -> None:
    told = refused(NomadError, **nomad.settings(nomad_namespace="nowhere"))
    assert "nomad namespace list" in told


def test_a_port_that_nothing_answers_on(nomad: Nomad) -> None:
    settings = nomad.settings(server_command=["bash", "-c", "sleep 1000"])
    with pytest.raises(StartFailed) as raised, SlotPool(**settings, start_timeout=6):
        pass
    assert "1 running" in str(raised.value)
    assert "no answer from the container at http://127.0.0.1:" in str(raised.value)


def test_an_allocation_that_is_not_slotpools(real: Nomad) -> None:
    command = ["python3", "-m", "http.server", "--bind", "127.0.0.1", "${NOMAD_PORT_http}"]
    settings = real.settings(server_command=["bash", "-c", " ".join(command)])
    with pytest.raises(SlotPoolError) as raised, SlotPool(**settings, start_timeout=3):
        pass
    assert "404" in str(raised.value)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Agent]:
    why_not = why_no_nomad()
    if why_not:
        pytest.skip(why_not)
    with Agent(acl=True) as agent:
        yield agent


README = (Path(__file__).resolve().parents[2] / "README.rst").read_text()
POLICY = textwrap.dedent(re.findall(r"^    namespace \"default\" \{.*?^    \}$", README, re.M | re.S)[0])


def test_the_documented_policy_is_enough(guarded: Agent) -> None:
    nomad = Nomad(guarded.address, guarded.api)
    settings = nomad.settings(nomad_token=guarded.token_for(POLICY), max_containers=2, scale_down_after=0.3)
    with SlotPool(**settings) as pool:
        held = [pool.acquire(timeout=60) for _ in range(3)]
        assert [s.bash("echo well").stdout for s in held] == ["well\n"] * 3
        pool.stop(purge_job=True)
    nomad.purge()


@pytest.mark.parametrize("lacking", ["alloc-lifecycle", "read-logs"])
def test_without_these_a_pool_still_works(guarded: Agent, lacking: str) -> None:
    nomad = Nomad(guarded.address, guarded.api)
    policy = POLICY.replace(f', "{lacking}"', "")
    assert lacking not in policy
    with nomad.pool(nomad_token=guarded.token_for(policy), lease_ttl=1.0) as pool:
        s = pool.acquire(timeout=30)
        os.kill(nomad.pid_of(s.alloc_id), signal.SIGKILL)
        s.release()
        with pool.slot(timeout=60) as s:
            assert s.bash("echo well").stdout == "well\n"
    nomad.purge()


@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        ("read-job", "read-job"),
        ("submit-job", "submit-job"),
        ("write", "variables capability write"),
    ],
)
def test_less_is_refused_and_what_is_missing_is_named(guarded: Agent, lacking: str, named: str) -> None:
    nomad = Nomad(guarded.address, guarded.api)
    policy = POLICY.replace(f'"{lacking}", ', "").replace(f', "{lacking}"', "")
    if lacking == "read-job":
        policy = policy.replace('"submit-job", ', "")  # which includes it
    told = refused(NomadDenied, **nomad.settings(nomad_token=guarded.token_for(policy)))
    assert named in told
    assert "NOMAD_TOKEN" in told
    nomad.purge()


def test_no_token_is_told(guarded: Agent) -> None:
    nomad = Nomad(guarded.address, guarded.api)
    assert "anonymous" in refused(NomadDenied, **nomad.settings())
    assert "token" in refused(NomadDenied, **nomad.settings(nomad_token="3b1a2f0e-0000-0000-0000-000000000000"))


def test_tls_with_client_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = why_no_nomad()
    if why_not:
        pytest.skip(why_not)
    with Agent(tls=True) as agent:
        nomad = Nomad(agent.address, agent.api)
        certificates = {
            "nomad_cacert": str(agent.ca_file),
            "nomad_client_cert": str(agent.client_cert),
            "nomad_client_key": str(agent.client_key),
        }
        with nomad.pool(**certificates) as pool, pool.slot() as s:
            assert s.bash("echo well").stdout == "well\n"
        nomad.purge()
        told = refused(NomadUnreachable, **nomad.settings(nomad_cacert=str(agent.ca_file)))
        assert "NOMAD_CLIENT_CERT" in told
        told = refused(NomadUnreachable, **nomad.settings())
        assert "NOMAD_CACERT" in told
        with pytest.raises(ConfigError, match="nomad_client_cert"):
            SlotPool(**nomad.settings(nomad_client_cert=str(agent.client_cert)))
        for name, value in certificates.items():
            monkeypatch.setenv(name.upper(), value)
        monkeypatch.setenv("NOMAD_ADDR", agent.address)
        client = NomadClient(Connection.of({}))
        assert client.leader()
        client.close()
