"""The Nomad job whose allocations are a pool's containers, and how it differs from one that stands.

The field names are those of Nomad's JSON jobs: https://developer.hashicorp.com/nomad/api-docs/json-jobs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...config import SlotPoolConfig
from ...errors import JobDiffers
from .types import Job

GROUP = "sandbox"
TASK = "sandbox-server"
PORT = "http"
_INSIDE = 8080  # where the server listens in a container of its own
_SECOND = 1_000_000_000  # Nomad's durations are nanoseconds
IN_CONTAINERS = ("docker", "podman")


def token_path(job_id: str) -> str:
    """The Nomad variable with the servers' token. A job's tasks, and nobody else without a policy, may read what is there."""
    return f"nomad/jobs/{job_id}"


def count_of(job: Job) -> int:
    """The number of containers that the job is to have.

    :raises JobDiffers: it has no such containers.
    """
    count = job.count(GROUP)
    if count is None:
        raise JobDiffers(f"job {job.id} has no group {GROUP!r}, so it is not slotpool's; choose another job_id (--job)")
    return count


def create_sandbox_job(config: SlotPoolConfig, count: int) -> dict[str, Any]:
    """The job that ``config`` describes, with ``count`` containers, as ``POST /v1/jobs`` takes it under ``Job``.

    It makes no deployments (``MaxParallel`` 0), as Nomad refuses to scale a job while one is active. A server that ends is
    started again in its place, and after three times in five minutes elsewhere: leases don't outlive a server anyway.
    """
    return {
        "ID": config.job_id,
        "Name": config.job_id,
        "Type": "service",
        "Datacenters": list(config.datacenter),
        **({"NodePool": config.node_pool} if config.node_pool is not None else {}),
        **({"Namespace": config.nomad_namespace} if config.nomad_namespace is not None else {}),
        **({"Region": config.nomad_region} if config.nomad_region is not None else {}),
        "Constraints": [
            {"LTarget": left, "Operand": operator, "RTarget": right} for left, operator, right in config.constraints
        ],
        "Update": {"MaxParallel": 0},
        "TaskGroups": [
            {
                "Name": GROUP,
                "Count": count,
                "Update": {"MaxParallel": 0},
                "Networks": [{"DynamicPorts": [_port(config)]}],
                "RestartPolicy": {"Attempts": 3, "Interval": 300 * _SECOND, "Delay": _SECOND, "Mode": "fail"},
                "ReschedulePolicy": {
                    "Unlimited": True,
                    "DelayFunction": "exponential",
                    "Delay": 5 * _SECOND,
                    "MaxDelay": 120 * _SECOND,
                },
                "Tasks": [_task(config)],
            }
        ],
    }


def _port(config: SlotPoolConfig) -> dict[str, Any]:
    return {"Label": PORT, **({"To": _INSIDE} if config.driver in IN_CONTAINERS else {})}


def _task(config: SlotPoolConfig) -> dict[str, Any]:
    path = token_path(config.job_id)
    return {
        "Name": TASK,
        "Driver": "raw_exec" if config.driver == "apptainer" else config.driver,
        # In that driver's chroot, of a masked /proc, bubblewrap doesn't work, and the isolation that does needs root.
        **({"User": "root"} if config.driver == "exec" and config.isolation != "none" else {}),
        "Config": {**_driver_config(config), **config.task_config},
        "Env": dict(config.env),
        "Resources": {"CPU": config.cpu, "MemoryMB": config.memory},
        "KillTimeout": 5 * _SECOND,  # Nomad starts the one in its place only when it has ended
        "LogConfig": {"MaxFiles": 2, "MaxFileSizeMB": 10},
        # Nomad keeps variables encrypted, and gives this one to the job's own tasks: the token is in no job, no log and no
        # environment. It is read once, so a change does nothing to running servers.
        "Templates": [
            {
                "DestPath": "secrets/token",
                "EmbeddedTmpl": f'{{{{ with nomadVar "{path}" }}}}{{{{ .token }}}}{{{{ end }}}}',
                "Perms": "0400",
                "ChangeMode": "noop",
            }
        ],
    }


def _driver_config(config: SlotPoolConfig) -> dict[str, Any]:
    if config.driver in IN_CONTAINERS:
        arguments = _arguments(config, "0.0.0.0", str(_INSIDE))
        return {
            "image": config.image,
            "ports": [PORT],
            "args": arguments,
            **({"entrypoint": list(config.server_command)} if config.server_command else {}),
            **({"volumes": list(config.volumes)} if config.volumes else {}),
            **({"cap_add": list(config.cap_add)} if config.cap_add else {}),
            **({"privileged": True} if config.privileged else {}),
        }
    arguments = _arguments(config, "${NOMAD_IP_http}", "${NOMAD_PORT_http}")
    if config.driver == "apptainer":
        command = config.server_command or ("python3", "-m", "slotpool", "serve")
        binds = [option for volume in ("${NOMAD_SECRETS_DIR}", *config.volumes) for option in ("--bind", volume)]
        return {
            "command": "apptainer",
            # Else /tmp, where the workspaces are, would be a tmpfs of 64 MiB.
            "args": [
                "exec",
                "--containall",
                "--writable-tmpfs",
                "--workdir",
                "${NOMAD_TASK_DIR}",
                *binds,
                config.image,
                *command,
                *arguments,
            ],
        }
    command = config.server_command or (sys.executable, "-m", "slotpool", "serve")
    return {
        "command": command[0],
        "args": [*command[1:], *arguments],
        **({"cap_add": list(config.cap_add)} if config.cap_add else {}),
    }


def _arguments(config: SlotPoolConfig, host: str, port: str) -> list[str]:
    """Of ``slotpool serve``."""
    optional = (
        ("--max-memory", config.max_memory),
        ("--max-cpus", config.max_cpus),
        ("--max-written", config.max_written),
        ("--max-disk", config.max_disk),
    )
    settings: Sequence[tuple[str, object]] = (
        ("--host", host),
        ("--port", port),
        ("--name", "${NOMAD_ALLOC_ID}"),
        ("--token-file", "${NOMAD_SECRETS_DIR}/token"),
        ("--slots", config.slots_per_container),
        ("--isolation", config.isolation),
        ("--max-output", config.max_output),
        ("--max-file-size", config.max_file_size),
        ("--max-processes", config.max_processes),
        *((name, value) for name, value in optional if value is not None),
        *(("--readonly-path", path) for path in config.readonly_paths),
    )
    return [str(word) for setting in settings for word in setting]


def differences(diff: Mapping[str, Any]) -> list[str]:
    """What a plan (``Diff`` of ``POST /v1/job/ID/plan``) would change, a line for each field: ``where: standing -> wanted``.

    The count of containers is none: it is planned as it stood, and who else shares the job may have scaled it since.
    """
    return list(_walk(diff, ""))


def _walk(diff: Mapping[str, Any], where: str) -> Iterator[str]:
    for field in diff.get("Fields") or ():
        if field.get("Type") != "None" and not (field["Name"] == "Count" and where == f"TaskGroup {GROUP}."):
            old, new = field.get("Old") or "(nothing)", field.get("New") or "(nothing)"
            yield f"{where}{field['Name']}: {old} -> {new}"
    for kind in ("Objects", "TaskGroups", "Tasks"):
        for inner in diff.get(kind) or ():
            if inner.get("Type") != "None":
                name = inner["Name"] if kind == "Objects" else f"{kind[:-1]} {inner['Name']}"
                yield from _walk(inner, f"{where}{name}.")
