"""``slotpool status``."""

from __future__ import annotations

import argparse
import json

from . import FAILED, job, options


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "status",
        help="show a cluster's containers",
        description="Show a job, its containers and their slots, and what is wrong with them. Changes nothing. Exit code 0: as "
        f"many containers answer as the job wants; 1: fewer do, or it is stopped; {FAILED}: there is no such job, or Nomad "
        "could not be asked.",
    )
    parser.set_defaults(run=run)
    options.add_cluster(parser, otherwise_here=False)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .report import look

    config = options.cluster_config(args)
    with job.connected(config) as client:
        told = look(client, config)
    print(json.dumps(told.as_dict(), indent=2) if args.json else told.as_text())
    return 0 if told.complete else 1
