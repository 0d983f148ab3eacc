"""``slotpool up``."""

from __future__ import annotations

import argparse
import json
import threading
import time
from typing import TYPE_CHECKING

from ..config import SlotPoolConfig
from ..errors import StartFailed
from . import job, options

if TYPE_CHECKING:
    from ..fleet.nomad.fleet import NomadFleet

_PERIOD = 0.5  # seconds between two looks, if nothing is told to have changed


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "up",
        help="deploy a cluster's containers",
        description="Deploy a job, or attach to one that stands, and wait until min_containers of its containers answer, for "
        "start_timeout seconds at most. The job stays; `slotpool down` ends it. A job that stands and is different is refused; "
        "with --set update_job=true it is changed.",
    )
    parser.set_defaults(run=run)
    options.add_cluster(parser, otherwise_here=False)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..fleet.nomad.fleet import NomadFleet
    from .report import look

    config = options.cluster_config(args)
    job.tell_builds()
    with job.connected(config) as client:
        stood = job.stands(client, config.job_id)
        fleet = NomadFleet(config)
        changed = threading.Event()
        try:
            try:
                fleet.start(config.min_containers, changed.set)
                _wait(fleet, config, changed)
            finally:
                fleet.stop(False)
        except BaseException:
            if not stood:
                job.say_left(args, client, config.job_id)
            raise
        told = look(client, config)
    print(json.dumps(told.as_dict(), indent=2) if args.json else told.as_text())
    return 0


def _wait(fleet: NomadFleet, config: SlotPoolConfig, changed: threading.Event) -> None:
    from .report import answering

    wanted = config.min_containers
    deadline = time.monotonic() + config.start_timeout
    ready: set[str] = set()
    said = ""
    while True:
        changed.clear()
        failure, members = fleet.failure(), fleet.members()
        ready &= {member.id for member in members}
        ready |= answering([member for member in members if member.id not in ready])
        if len(ready) >= wanted:
            return
        state = f"{len(ready)} of {wanted} container(s) answer; {fleet.describe()}"
        if failure is not None:
            raise failure
        left = deadline - time.monotonic()
        if left <= 0:
            raise StartFailed(f"expected {wanted} container(s) within {config.start_timeout:g} s: {state}")
        if state != said:
            job.say(state)
            said = state
        changed.wait(min(left, _PERIOD))
