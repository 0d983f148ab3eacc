"""The command line: ``slotpool exec``, ``serve`` and ``bench``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .config import ISOLATIONS
from .errors import SlotPoolError

# As timeout(1) and env(1) have them.
_TIMED_OUT = 124
_FAILED = 125
_INTERRUPTED = 130
_MAX_OUTPUT = 64 * 1024 * 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slotpool", description="Isolated slots for code you don't trust.")
    parser.add_argument("--version", action="version", version=f"slotpool {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what goes on to standard error")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--isolation", choices=ISOLATIONS, default="auto", help="default: %(default)s, the strongest that works"
    )

    run = commands.add_parser(
        "exec",
        parents=[shared],
        help="run one command in one slot",
        description="Run a command in a fresh slot of this machine and pass its output and exit code on. "
        f"Exit code {_TIMED_OUT}: it timed out; {_FAILED}: it could not be run.",
    )
    run.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS", help="default: %(default)g")
    run.add_argument("--network", action=argparse.BooleanOptionalAction, help="default: the isolation's own; none with bwrap")
    run.add_argument("-i", "--stdin", action="store_true", help="pass standard input on; it is read to its end first")
    run.add_argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable; repeatable")
    run.add_argument("argv", nargs="+", metavar="CMD", help="a program and its arguments, or one word of shell code")

    serve = commands.add_parser(
        "serve",
        parents=[shared],
        help="run a sandbox server",
        description="Serve slots over HTTP until interrupted. Clients need the bearer token in the variable SLOTPOOL_TOKEN; "
        "without one the server listens on loopback only. The address is printed on standard output.",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    serve.add_argument("--port", type=int, default=8080, help="default: %(default)s; 0 for any free one")
    serve.add_argument("--slots", type=int, default=10, help="default: %(default)s")
    serve.add_argument("--state-dir", metavar="DIR", help="where workspaces are kept")
    serve.add_argument("--token-file", metavar="FILE", help="read the bearer token from there instead")
    serve.add_argument("--name", default="", help="told in health; for whoever starts many servers")

    bench = commands.add_parser(
        "bench",
        parents=[shared],
        help="measure this machine",
        description="Measure an embedded pool next to plain subprocesses.",
    )
    bench.add_argument("--json", action="store_true", help="for machines")
    bench.add_argument("--rounds", type=int, default=6, help="more is slower and steadier; default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point; ends by ``SystemExit``."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        sys.exit({"exec": _exec, "serve": _serve, "bench": _bench}[args.command](args))
    except SlotPoolError as e:
        print(f"slotpool: {e}", file=sys.stderr)
        sys.exit(_FAILED)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _exec(args: argparse.Namespace) -> int:
    from .pool import SlotPool

    env: dict[str, str] = {}
    for setting in args.env:
        name, equals, value = setting.partition("=")
        env[name] = value if equals else os.environ.get(name, "")
    stdin = sys.stdin.buffer.read() if args.stdin else None
    command = args.argv[0] if len(args.argv) == 1 else shlex.join(args.argv)
    settings: dict[str, Any] = {"isolation": args.isolation, "max_output": _MAX_OUTPUT, "network": args.network}
    with SlotPool(backend="local", slots_per_container=1, max_containers=1, **settings) as pool, pool.slot() as slot:
        result = slot.bash(command, timeout=args.timeout, env=env, stdin=stdin)
    for stream, content in ((sys.stdout, result.stdout_bytes), (sys.stderr, result.stderr_bytes)):
        stream.buffer.write(content)
        stream.buffer.flush()
    if result.timed_out:
        print(f"slotpool: timed out after {args.timeout:g} s", file=sys.stderr)
        return _TIMED_OUT
    return result.exit_code if result.exit_code is not None else _FAILED


def _serve(args: argparse.Namespace) -> int:
    from .config import SlotPoolConfig
    from .sandbox.serve import ServeConfig, serve
    from .sandbox.tenancies import HostConfig

    logging.getLogger("slotpool").setLevel(logging.INFO)
    # The same bounds as a pool's, and the same messages.
    checked = SlotPoolConfig(
        backend="local",
        token=_token_of(args.token_file),
        slots_per_container=args.slots,
        isolation=args.isolation,
        state_dir=args.state_dir and os.path.abspath(args.state_dir),
    )
    if not 0 <= args.port <= 65535:
        raise SlotPoolError(f"port: expected a number from 0 to 65535, got {args.port}")
    host = HostConfig(
        name=args.name, slots=checked.slots_per_container, isolation=checked.isolation, state_dir=checked.state_dir
    )
    serve(ServeConfig(host, args.host, args.port, checked.token), lambda address: print(address, flush=True))
    return 0


def _token_of(path: str | None) -> str | None:
    if path is None:
        return os.environ.get("SLOTPOOL_TOKEN") or None
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError) as e:
        raise SlotPoolError(f"token-file: expected a file with the token in it, got {path}: {e}") from e


def _bench(args: argparse.Namespace) -> int:
    from . import bench
    from .pool import SlotPool

    if args.rounds < 1:
        raise SlotPoolError(f"rounds: expected at least 1, got {args.rounds}")
    with SlotPool(backend="local", slots_per_container=10, max_containers=1, isolation=args.isolation) as pool:
        told = bench.report(pool, bench.run(pool, args.rounds))
    print(json.dumps(told, indent=2) if args.json else bench.as_text(told))
    return 0


if __name__ == "__main__":
    main()
