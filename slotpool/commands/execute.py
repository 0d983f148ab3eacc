"""``slotpool exec``."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import FAILED, job, options

if TYPE_CHECKING:
    from ..pool import SlotPool

_TIMED_OUT = 124  # as timeout(1) has it
_MAX_OUTPUT = 64 * 1024 * 1024


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "exec",
        help="run one command in one slot",
        description="Run a command in a fresh slot of this machine, or of a cluster, and pass its output and exit code on. "
        f"Exit code {_TIMED_OUT}: it timed out; {FAILED}: it could not be run. A job that stands is taken as it is; one that "
        "does not is deployed, and left standing.",
    )
    parser.set_defaults(run=run)
    options.add_isolation(parser)
    options.add_cluster(parser, otherwise_here=True)
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument(
        "--network", action=argparse.BooleanOptionalAction, help="default: the isolation's own; none with bwrap"
    )
    parser.add_argument("-i", "--stdin", action="store_true", help="pass standard input on; it is read to its end first")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable; repeatable")
    parser.add_argument("argv", nargs="+", metavar="CMD", help="a program and its arguments, or one word of shell code")


@contextlib.contextmanager
def _pool(args: argparse.Namespace) -> Iterator[SlotPool]:
    from ..pool import SlotPool

    if args.nomad is None:
        options.require_here(args)
        with SlotPool(
            backend="local",
            slots_per_container=1,
            max_containers=1,
            isolation=args.isolation,
            max_output=_MAX_OUTPUT,
            network=args.network,
        ) as pool:
            yield pool
        return
    isolation = None if args.isolation == "auto" else args.isolation
    config = options.cluster_config(args, {"update_job": False}, isolation=isolation, network=args.network)
    with job.pool_on_job(args, config) as pool:
        yield pool


def run(args: argparse.Namespace) -> int:
    env: dict[str, str] = {}
    for setting in args.env:
        name, equals, value = setting.partition("=")
        env[name] = value if equals else os.environ.get(name, "")
    stdin = sys.stdin.buffer.read() if args.stdin else None
    command = args.argv[0] if len(args.argv) == 1 else shlex.join(args.argv)
    with _pool(args) as pool, pool.slot() as slot:
        result = slot.bash(command, timeout=args.timeout, env=env, stdin=stdin)
    for stream, content in ((sys.stdout, result.stdout_bytes), (sys.stderr, result.stderr_bytes)):
        stream.buffer.write(content)
        stream.buffer.flush()
    if result.truncated:
        job.say("its output was too long, and something is left out; max_output is the limit")
    if result.timed_out:
        job.say(f"timed out after {args.timeout:g} s")
        return _TIMED_OUT
    return result.exit_code if result.exit_code is not None else FAILED
