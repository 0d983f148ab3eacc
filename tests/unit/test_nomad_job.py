"""The job's shape for each driver, and what allocations and evaluations are diagnosed with."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from slotpool import SlotPoolConfig
from slotpool.errors import CrashLoop, ImageUnavailable, PlacementFailed
from slotpool.fleet.nomad import diagnosis
from slotpool.fleet.nomad.job import create_sandbox_job, differences
from slotpool.fleet.nomad.types import Allocation, Evaluation


def job_of(**settings: Any) -> dict[str, Any]:
    return create_sandbox_job(SlotPoolConfig(nomad_address="http://n:4646", **settings), 2)


def task_of(**settings: Any) -> Any:
    return job_of(**settings)["TaskGroups"][0]["Tasks"][0]


def test_no_deployment_is_ever_made() -> None:
    job = job_of()
    assert job["Update"]["MaxParallel"] == job["TaskGroups"][0]["Update"]["MaxParallel"] == 0
    assert job["TaskGroups"][0]["Count"] == 2
    json.dumps(job)


def test_containers_are_unprivileged_and_reached_through_a_dynamic_port() -> None:
    for driver in ("docker", "podman"):
        task = task_of(driver=driver, image="i:1", slots_per_container=7)
        assert task["Driver"] == driver
        assert task["Config"]["image"] == "i:1"
        assert set(task["Config"]) == {"image", "ports", "args"}
        assert task["Config"]["args"][task["Config"]["args"].index("--slots") + 1] == "7"
        assert job_of(driver=driver)["TaskGroups"][0]["Networks"] == [{"DynamicPorts": [{"Label": "http", "To": 8080}]}]


def test_what_a_user_adds_goes_through() -> None:
    more = {"privileged": True, "cap_add": ["SYS_ADMIN"], "volumes": ["/a:/b:ro"], "task_config": {"shm_size": 1 << 30}}
    task = task_of(**more, env={"A": "b"}, cpu=900, memory=2048)
    config = task["Config"]
    assert (config["privileged"], config["cap_add"], config["volumes"]) == (True, ["SYS_ADMIN"], ["/a:/b:ro"])
    assert (config["shm_size"], task["Env"], task["Resources"]) == (1 << 30, {"A": "b"}, {"CPU": 900, "MemoryMB": 2048})
    job = job_of(datacenter=["a", "b"], node_pool="gpu", constraints=[("${attr.cpu.arch}", "=", "amd64")], nomad_namespace="n")
    assert (job["Datacenters"], job["NodePool"], job["Namespace"]) == (["a", "b"], "gpu", "n")
    assert job["Constraints"] == [{"LTarget": "${attr.cpu.arch}", "Operand": "=", "RTarget": "amd64"}]


def test_servers_on_the_node_itself() -> None:
    for driver in ("exec", "raw_exec"):
        config = task_of(driver=driver)["Config"]
        assert (config["command"], config["args"][:3]) == (sys.executable, ["-m", "slotpool", "serve"])
        assert config["args"][config["args"].index("--port") + 1] == "${NOMAD_PORT_http}"
    assert task_of(driver="exec")["User"] == "root"
    assert "User" not in task_of(driver="raw_exec")
    assert "User" not in task_of(driver="exec", isolation="none")
    assert task_of(driver="raw_exec", server_command=["/opt/slotpool", "serve"])["Config"]["command"] == "/opt/slotpool"


def test_apptainer_runs_through_raw_exec() -> None:
    task = task_of(driver="apptainer", image="/images/sandbox.sif", volumes=["/data"])
    words = task["Config"]["args"]
    assert (task["Driver"], task["Config"]["command"], words[0]) == ("raw_exec", "apptainer", "exec")
    assert (
        words.index("${NOMAD_SECRETS_DIR}") < words.index("/data") < words.index("/images/sandbox.sif") < words.index("serve")
    )


def test_the_token_comes_by_a_template_that_only_root_can_read() -> None:
    job = job_of(token="SLOTPOOL_TEST_secret")
    assert "SLOTPOOL_TEST_secret" not in json.dumps(job)
    (template,) = task_of()["Templates"]
    assert (template["Perms"], template["ChangeMode"]) == ("0400", "noop")


def test_differences_are_told_field_by_field() -> None:
    diff = {
        "Type": "Edited",
        "Fields": [{"Type": "Edited", "Name": "Priority", "Old": "50", "New": "60"}],
        "TaskGroups": [
            {
                "Type": "Edited",
                "Name": "sandbox",
                "Fields": [
                    {"Type": "Edited", "Name": "Count", "Old": "2", "New": "1"},  # by who shares the job, just now
                    {"Type": "Added", "Name": "Count2", "Old": "", "New": "1"},
                ],
                "Tasks": [
                    {
                        "Type": "Edited",
                        "Name": "sandbox-server",
                        "Fields": [{"Type": "None", "Name": "Driver", "Old": "docker", "New": "docker"}],
                        "Objects": [
                            {
                                "Type": "Added",
                                "Name": "Config",
                                "Fields": [{"Type": "Added", "Name": "x", "Old": "", "New": "1"}],
                            },
                        ],
                    }
                ],
            },
            {"Type": "None", "Name": "other"},
        ],
    }
    assert differences(diff) == [
        "Priority: 50 -> 60",
        "TaskGroup sandbox.Count2: (nothing) -> 1",
        "TaskGroup sandbox.Task sandbox-server.Config.x: (nothing) -> 1",
    ]
    assert differences({"Type": "None", "Fields": [{"Type": "None", "Name": "a"}]}) == []


def allocation(status: str, *events: tuple[str, str], index: int = 0, created: int = 1, desired: str = "run") -> Allocation:
    told = [{"Type": kind, "DisplayMessage": message, "Time": i} for i, (kind, message) in enumerate(events)]
    return Allocation.parse(
        {
            "ID": f"{index}-{created}",
            "Name": f"j.sandbox[{index}]",
            "ClientStatus": status,
            "DesiredStatus": desired,
            "NodeName": "node",
            "CreateIndex": created,
            "TaskStates": {"sandbox-server": {"Events": told}},
        }
    )


@pytest.mark.parametrize(
    ("events", "kind", "words"),
    [
        ([("Driver Failure", "Failed to pull `i:local`: not found")], ImageUnavailable, "slotpool build --image i:local"),
        ([("Driver Failure", "failed to launch command")], CrashLoop, "failed to launch command"),
        ([("Task hook failed", 'running as user "root" is disallowed')], CrashLoop, "user.denylist"),
        ([("Not Restarting", "Exceeded allowed attempts 3")], CrashLoop, "nomad alloc logs -stderr"),
        ([("Terminated", "Exit Code: 137"), ("Not Restarting", "Exceeded allowed attempts 3")], CrashLoop, "memory"),
    ],
)
def test_what_events_say(events: list[tuple[str, str]], kind: type[Exception], words: str) -> None:
    failure = diagnosis.of_allocations([allocation("pending", *events)], "i:local", "docker", {})
    assert isinstance(failure, kind)
    assert words in str(failure)


def test_only_the_newest_of_each_index_counts() -> None:
    failed = allocation("failed", ("Not Restarting", "Exceeded allowed attempts 3"))
    runs = allocation("running", created=2)
    assert diagnosis.of_allocations([runs, failed], "i", "docker", {}) is None
    assert diagnosis.of_allocations([failed], "i", "docker", {"0-1": "no luck"}) is not None
    assert "no luck" in str(diagnosis.of_allocations([failed], "i", "docker", {"0-1": "no luck"}))
    assert diagnosis.of_allocations([allocation("failed", desired="stop")], "i", "docker", {}) is None


def evaluation(status: str, failed: dict[str, Any] | None = None) -> Evaluation:
    return Evaluation.parse(
        {"ID": "e", "Status": status, "FailedTGAllocs": {"sandbox": failed} if failed is not None else None}
    )


@pytest.mark.parametrize(
    ("failed", "words"),
    [
        ({"NodesEvaluated": 3, "DimensionExhausted": {"memory": 3}}, "memory is used up on 3 node"),
        ({"NodesEvaluated": 2, "ConstraintFiltered": {"missing drivers": 2}}, "the driver is missing on 2 node"),
        ({"NodesEvaluated": 2, "ConstraintFiltered": {"${node.class} = gpu": 2}}, "${node.class} = gpu rules out 2 node"),
        ({"NodesEvaluated": 0, "NodesAvailable": {"dc9": 0}}, "no node is ready in dc9"),
        ({"NodesEvaluated": 1, "QuotaExhausted": ["memory exhausted (5 > 4)"]}, "the quota is used up"),
        ({}, "no node"),
    ],
)
def test_why_nothing_is_placed(failed: dict[str, Any], words: str) -> None:
    failure = diagnosis.of_evaluations([evaluation("complete", failed)], 1)
    assert isinstance(failure, PlacementFailed)
    assert words in str(failure)


def test_an_old_decision_says_nothing() -> None:
    failed = evaluation("complete", {"DimensionExhausted": {"cpu": 1}})
    assert diagnosis.of_evaluations([failed, evaluation("pending")], 1) is None
    assert diagnosis.of_evaluations([failed, evaluation("complete")], 1) is None
    assert diagnosis.of_evaluations([failed], 0) is None
