"""``slotpool down``."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

from ..errors import SlotPoolError
from . import job, options

if TYPE_CHECKING:
    from ..fleet.nomad.client import NomadClient

_WAIT = 2.0  # seconds that one query is held


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "down",
        help="end a cluster's containers",
        description="Stop a job and wait until its containers have ended; whoever has slots there loses them. No error if "
        "there is no such job.",
    )
    parser.set_defaults(run=run)
    options.add_cluster(parser, otherwise_here=False)
    options.add_json(parser)
    parser.add_argument("--purge", action="store_true", help="have Nomad forget the job, and the servers' token")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for the containers to end; default: %(default)g"
    )


def run(args: argparse.Namespace) -> int:
    from ..fleet.nomad.job import count_of, token_path
    from .report import alive

    config = options.cluster_config(args)
    id_ = config.job_id
    with job.connected(config) as client:
        stood = client.job(id_)
        if stood is not None:
            count_of(stood)
            found, _ = client.allocations(id_)
            ending = sum(map(alive, found))
            if ending:
                job.say(f"job {id_}: ending {ending} container(s)")
            client.stop(id_, purge=args.purge)
        _wait(client, id_, args.timeout)
        if args.purge:
            client.delete_variable(token_path(id_))
    told = {"job": id_, "nomad": client.connection.address, "existed": stood is not None, "purged": args.purge}
    done = "there was none" if stood is None else "purged" if args.purge else "stopped"
    print(json.dumps(told, indent=2) if args.json else f"job {id_} at {client.connection.address}: {done}")
    return 0


def _wait(client: NomadClient, id_: str, limit: float) -> None:
    """Wait until no allocation is left, and the job is still stopped."""
    from .report import alive

    deadline = time.monotonic() + limit
    index = 0
    while True:
        left = deadline - time.monotonic()
        found, index = client.allocations(id_, index, max(0.0, min(left, _WAIT)) if index else 0.0)
        if job.stands(client, id_):
            raise SlotPoolError(f"job {id_} has been started again meanwhile, as a pool uses it; stop its pools first")
        running = [one for one in found if alive(one)]
        if not running:
            return
        if left <= 0:
            listed = ", ".join(f"{one.id[:8]} on node {one.node}, {one.status.value}" for one in running)
            raise SlotPoolError(f"job {id_} is stopped, but after {limit:g} s these have not ended: {listed}")
