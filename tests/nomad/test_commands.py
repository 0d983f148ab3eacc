"""The commands for a cluster, typed as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from agents import Agent, why_no_nomad
from conftest import PACKAGE, wait_until
from nomads import Nomad

from slotpool import SlotPool

_MEMORY = 256  # MB


def slotpool(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": PACKAGE, **variables}
    command = [sys.executable, "-m", "slotpool", *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)


def options(settings: dict[str, Any]) -> list[str]:
    """The settings of a pool as a command's options."""
    rest = {name: value for name, value in settings.items() if name not in ("nomad_address", "job_id", "health_check_interval")}
    sets = [word for name, value in rest.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return ["--nomad", settings["nomad_address"], "--job", settings["job_id"], *sets]


@pytest.fixture
def nomad_address(real: Nomad) -> str:
    return real.address


@pytest.fixture
def job(real: Nomad, nomad_address: str) -> list[str]:
    """The options for a job of the test's own."""
    return ["--nomad", nomad_address, "--job", real.new_job()]


@pytest.fixture
def small(real: Nomad) -> list[str]:
    """The same, with small containers."""
    return options(real.settings(memory=_MEMORY))


def running(real: Nomad, id_: str, count: int = 1) -> list[str]:
    """The ids of the job's allocations, once Nomad knows that they run."""

    def known() -> bool:
        return [one["ClientStatus"] for one in real.running(id_)] == ["running"] * count

    assert wait_until(known)
    return [str(one["ID"]) for one in real.running(id_)]


def told(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_the_life_of_a_job(real: Nomad, small: list[str]) -> None:
    where, id_ = small[:4], small[3]
    up = slotpool("up", *small, "--set", "min_containers=2", "--json")
    assert "of 2 container(s) answer" in up.stderr
    report = told(up)
    assert (report["job"], report["count"], report["answering"], report["complete"]) == (id_, 2, 2, True)
    assert [one["allocation"] for one in report["containers"]] == running(real, id_, 2)
    for index, one in enumerate(report["containers"]):
        assert (one["index"], one["slots"], one["quarantined"], one["answers"]) == (index, 2, 0, True)
        assert one["isolation"] in ("bwrap", "user")
    again = told(slotpool("up", *small, "--set", "min_containers=2", "--json"))
    assert [one["address"] for one in again["containers"]] == [one["address"] for one in report["containers"]]

    def at_rest() -> bool:
        seen = told(slotpool("status", *where, "--json"))
        return all(one["counts"]["free"] == 2 and one["status"] == "running" for one in seen["containers"])

    assert wait_until(at_rest)
    text = slotpool("status", *where)
    assert text.returncode == 0
    for word in (id_, "2 of 2", "2 free", report["containers"][1]["address"], report["containers"][1]["allocation"][:8]):
        assert word in text.stdout

    down = slotpool("down", *where, "--json")
    assert told(down) == {"job": id_, "nomad": real.address, "existed": True, "purged": False}
    assert not real.running_anything(id_)
    stopped = slotpool("status", *where)
    assert stopped.returncode == 1
    assert "the job is stopped" in stopped.stdout
    assert slotpool("up", *small).returncode == 0
    assert slotpool("down", *where, "--purge").returncode == 0
    assert not real.running_anything(id_)
    gone = slotpool("status", *where, "--json")
    assert (gone.returncode, gone.stdout) == (125, "")
    assert f"there is no job {id_}" in gone.stderr
    assert real.api("GET", f"/v1/vars?prefix=nomad/jobs/{id_}") == []
    assert told(slotpool("down", *where, "--purge", "--json"))["existed"] is False


def test_a_job_of_somebody_else_is_left_alone(real: Nomad, job: list[str]) -> None:
    task = {"Name": "t", "Driver": "raw_exec", "Config": {"command": "/bin/sleep", "args": ["1000"]}}
    body = {"ID": job[3], "Datacenters": ["dc1"], "TaskGroups": [{"Name": "g", "Tasks": [task]}]}
    real.api("POST", "/v1/jobs", {"Job": body})
    for command in ("status", "down"):
        refused = slotpool(command, *job)
        assert refused.returncode == 125
        assert "it is not slotpool's" in refused.stderr
    assert slotpool("up", *job, "--set", "driver=raw_exec").returncode == 125
    assert real.api("GET", f"/v1/job/{job[3]}")["Stop"] is False


def test_a_standing_job_that_differs_is_refused_and_can_be_changed(small: list[str]) -> None:
    assert slotpool("up", *small).returncode == 0
    more = ["--set", "max_processes=500"]
    refused = slotpool("up", *small, *more)
    assert (refused.returncode, refused.stdout) == (125, "")
    assert "1024 -> 500" in refused.stderr
    assert "left standing" not in refused.stderr
    assert slotpool("up", *small, *more, "--set", "update_job=True").returncode == 0


def test_servers_that_end_at_once(small: list[str]) -> None:
    failed = slotpool("up", *small, "--set", 'server_command=["/bin/false"]')
    assert failed.returncode == 125
    assert "ends each time it is started" in failed.stderr


def test_status_says_what_is_wrong(real: Nomad, small: list[str]) -> None:
    where, id_ = small[:4], small[3]
    assert slotpool("up", *small, "--set", 'constraints=[["", "distinct_hosts", "true"]]').returncode == 0
    real.api("POST", f"/v1/job/{id_}/scale", {"Count": 2, "Target": {"Group": "sandbox"}})

    def unplaced() -> bool:
        return any(one.get("FailedTGAllocs") for one in real.api("GET", f"/v1/job/{id_}/evaluations"))

    assert wait_until(unplaced)
    pid = real.pid_of(running(real, id_)[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        stuck = told(slotpool("status", *where, "--json"), 1)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert stuck["failure"]["kind"] == "PlacementFailed"
    assert "1 container(s) find no node" in stuck["failure"]["message"]
    assert (stuck["count"], stuck["answering"]) == (2, 0)
    assert "no answer" in stuck["containers"][0]["trouble"]
    text = slotpool("status", *where)
    assert text.returncode == 1
    assert "1 of 2 container(s) answer" in text.stdout
    assert "PlacementFailed: 1 container(s) find no node" in text.stdout
    wrong = told(slotpool("status", *where, "--json", SLOTPOOL_TOKEN="wrong"), 1)
    assert "Authorization" in wrong["containers"][0]["trouble"]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Agent]:
    """An agent that asks for ACL tokens."""
    if why_no_nomad():
        pytest.skip(why_no_nomad())
    with Agent(acl=True) as agent:
        yield agent


def test_status_shows_what_its_token_may_see(guarded: Agent) -> None:
    nomad = Nomad(guarded.address, guarded.api)
    small = options(nomad.settings(memory=_MEMORY))
    where, id_ = small[:4], small[3]
    try:
        assert slotpool("up", *small, NOMAD_TOKEN=guarded.token).returncode == 0
        reader = guarded.token_for('namespace "default" { policy = "read" }')
        report = told(slotpool("status", *where, "--json", NOMAD_TOKEN=reader))
        assert report["complete"] is True
        assert (report["containers"][0]["answers"], report["containers"][0]["counts"]) == (True, None)
        assert f"nomad/jobs/{id_}" in report["notes"][0]
        text = slotpool("status", *where, NOMAD_TOKEN=reader)
        assert text.returncode == 0
        assert "their slots can't be shown" in text.stdout
        token = guarded.api("GET", f"/v1/var/nomad/jobs/{id_}")["Items"]["token"]
        report = told(slotpool("status", *where, "--json", NOMAD_TOKEN=reader, SLOTPOOL_TOKEN=token))
        assert report["containers"][0]["slots"] == 2
        assert report["notes"] == []
        refused = slotpool("down", *where, NOMAD_TOKEN=reader)
        assert refused.returncode == 125
        assert "submit-job" in refused.stderr
        assert slotpool("status", *where).returncode == 125
    finally:
        nomad.purge()
        assert wait_until(lambda: not nomad.running_anything(id_))


def test_exec_deploys_a_job_and_takes_a_standing_one_as_it_is(real: Nomad, small: list[str]) -> None:
    where, id_ = small[:4], small[3]
    first = slotpool("exec", *small, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (first.stdout, first.returncode) == ("out\n", 7)
    assert "err" in first.stderr.splitlines()
    assert f"job {id_} is left standing; `slotpool down {' '.join(where)}` ends it" in first.stderr
    containers = running(real, id_)
    again = slotpool("exec", *where, "--set", "driver=raw_exec", "--", "echo", "a b", "$HOME", NOMAD_ADDR="http://127.0.0.1:1")
    assert (again.stdout, again.stderr, again.returncode) == ("a b $HOME\n", "", 0)
    # Without an address it is the environment's.
    by_name = ["--nomad", "--job", id_, "--set", "driver=raw_exec"]
    assert slotpool("exec", *by_name, "echo well", NOMAD_ADDR=real.address).stdout == "well\n"
    refused = slotpool("exec", *where, "--set", "driver=raw_exec", "--isolation", "none", "touch /tmp/ran")
    assert (refused.returncode, refused.stdout) == (125, "")
    assert "isolation: expected none" in refused.stderr
    long = slotpool("exec", *where, "--set", "driver=raw_exec", "seq 100000")
    assert len(long.stdout) < 100_000
    assert "something is left out" in long.stderr
    assert running(real, id_) == containers


@pytest.mark.timeout(300)
def test_bench_measures_a_job(real: Nomad) -> None:
    settings = options(real.settings(slots_per_container=10, memory=_MEMORY))
    done = slotpool("bench", *settings, "--rounds", "1", "--json")
    assert "is left standing" in done.stderr
    figures = told(done)["figures"]
    assert any(figure["name"].startswith("acquire") for figure in figures)
    assert not any("memory" in figure["name"] for figure in figures)


def test_down_says_that_a_pool_has_started_the_job_again(real: Nomad) -> None:
    settings = real.settings(memory=_MEMORY)
    with SlotPool(**settings) as pool:
        pid = real.pid_of(running(real, pool.config.job_id)[0])
        os.kill(pid, signal.SIGSTOP)  # so that it doesn't end before the pool has come
        try:
            done = slotpool("down", *options(settings)[:4])
        finally:
            os.kill(pid, signal.SIGCONT)
    assert (done.returncode, done.stdout) == (125, "")
    assert "a pool uses it" in done.stderr


def test_down_says_what_does_not_end(real: Nomad, small: list[str]) -> None:
    where, id_ = small[:4], small[3]
    assert slotpool("up", *small).returncode == 0
    (container,) = running(real, id_)
    pid = real.pid_of(container)
    os.kill(pid, signal.SIGSTOP)
    try:
        stuck = slotpool("down", *where, "--timeout", "0.5")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (stuck.returncode, stuck.stdout) == (125, "")
    assert f"have not ended: {container[:8]} on node" in stuck.stderr
    assert slotpool("down", *where).returncode == 0
    assert not real.running_anything(id_)
