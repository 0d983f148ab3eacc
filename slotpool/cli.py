"""The command line; its commands are in :mod:`slotpool.commands`."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence

from . import __version__
from .commands import FAILED, bench, build, down, execute, serve, status, top, up
from .errors import SlotPoolError

_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slotpool", description="Isolated slots for code you don't trust.")
    parser.add_argument("--version", action="version", version=f"slotpool {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log what goes on to standard error; -vv each lease and execution"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (execute, serve, top, bench, build, up, status, down):
        command.add(commands)
    return parser


def _warn(message: object, *_: object, **__: object) -> None:
    print(f"slotpool: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point; ends by ``SystemExit``."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if args.verbose > 1:
        logging.getLogger("slotpool").setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            sys.exit(args.run(args))
    except SlotPoolError as e:
        print(f"slotpool: {e}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
