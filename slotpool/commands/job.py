"""What the commands for a cluster share: connections, and telling what is left standing."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..config import SlotPoolConfig
from ..errors import NomadError

if TYPE_CHECKING:
    from ..fleet.nomad.client import NomadClient
    from ..pool import SlotPool


def say(text: str) -> None:
    print(f"slotpool: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def connected(config: SlotPoolConfig) -> Iterator[NomadClient]:
    from ..fleet.nomad.client import NomadClient
    from ..fleet.nomad.fleet import connection_of

    with contextlib.closing(NomadClient(connection_of(config))) as client:
        yield client


def stands(client: NomadClient, job_id: str) -> bool:
    job = client.job(job_id)
    return job is not None and not job.stopped


def tell_builds() -> None:
    """An image is built where it is missing, which takes minutes: log what goes on."""
    logging.getLogger("slotpool.fleet.nomad.image").setLevel(logging.INFO)


def say_left(args: argparse.Namespace, client: NomadClient, job_id: str) -> None:
    """Say that the job is left standing, if it is."""
    where = f" --nomad {args.nomad}" if args.nomad else ""
    with contextlib.suppress(NomadError):
        if stands(client, job_id):
            say(f"job {job_id} is left standing; `slotpool down{where} --job {job_id}` ends it")


@contextlib.contextmanager
def pool_on_job(args: argparse.Namespace, config: SlotPoolConfig) -> Iterator[SlotPool]:
    """A pool on the job, which is deployed if it does not stand, and stands afterwards."""
    from ..pool import SlotPool

    tell_builds()
    with connected(config) as client:
        stood = stands(client, config.job_id)
        try:
            with SlotPool(config) as pool:
                yield pool
        finally:
            if not stood:
                say_left(args, client, config.job_id)
