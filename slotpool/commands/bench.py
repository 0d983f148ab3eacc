"""``slotpool bench``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import ConfigError, SlotPoolError
from . import job, options

_SLOTS = 10  # that a measurement needs ready


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure this machine, or a cluster",
        description="Measure an embedded pool, or one on a cluster, next to plain subprocesses of this machine. A job that "
        "stands is taken as it is, and should be idle; one that does not is deployed, and left standing.",
    )
    parser.set_defaults(run=run)
    options.add_isolation(parser)
    options.add_cluster(parser, otherwise_here=True)
    options.add_json(parser)
    parser.add_argument("--save", metavar="FILE", help="keep the figures, as JSON, for --compare")
    parser.add_argument("--compare", metavar="FILE", help="show what --save has kept beside each figure")
    parser.add_argument("--rounds", type=int, default=6, help="more is slower and steadier; default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from .. import bench
    from ..pool import SlotPool

    if args.rounds < 1:
        raise SlotPoolError(f"rounds: expected at least 1, got {args.rounds}")
    before = _kept(args.compare) if args.compare is not None else None
    if args.save is not None:
        _require_writable(args.save)
    if args.nomad is None:
        options.require_here(args)
        with SlotPool(backend="local", slots_per_container=_SLOTS, max_containers=1, isolation=args.isolation) as pool:
            told = bench.report(pool, bench.run(pool, args.rounds))
    else:
        told = _on_job(args)
    if args.save is not None:
        with open(args.save, "w") as file:
            json.dump(told, file, indent=2)
    if before is not None:
        told = bench.compared(told, before)
    print(json.dumps(told, indent=2) if args.json else bench.as_text(told))
    return 0


def _kept(path: str) -> dict[str, Any]:
    """What --save has written; asked for before minutes are spent on measuring."""
    try:
        with open(path) as file:
            kept = json.load(file)
        if not all(isinstance(figure["value"], (int, float, type(None))) and figure["name"] for figure in kept["figures"]):
            raise ValueError("figures without a name or a number")
        return dict(kept)
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise SlotPoolError(f"--compare: expected a file that `slotpool bench --save` has written, got {path}: {e!r}") from e


def _require_writable(path: str) -> None:
    try:
        with open(path, "a"):
            pass
    except OSError as e:
        raise SlotPoolError(f"--save: expected a file that can be written, got {path}: {e.strerror}") from e


def _on_job(args: argparse.Namespace) -> dict[str, object]:
    from .. import bench

    isolation = None if args.isolation == "auto" else args.isolation
    config = options.cluster_config(args, {"update_job": False, "prefetch": _SLOTS}, isolation=isolation)
    if config.prefetch < _SLOTS:
        raise ConfigError("prefetch", f"at least {_SLOTS}, which are measured", str(config.prefetch))
    with job.pool_on_job(args, config) as pool:
        return {**bench.report(pool, bench.run(pool, args.rounds)), "job": config.job_id}
