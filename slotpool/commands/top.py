"""``slotpool top``."""

from __future__ import annotations

import argparse
import contextlib
import select
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Callable

from ..errors import ConfigError, SlotPoolError
from . import FAILED, job, options

if TYPE_CHECKING:
    from ..sandbox.client import SandboxClient
    from ..top import Look, Row

_LIMIT = 2.0  # seconds for a server to answer
_AT_ONCE = 16


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "top",
        help="watch containers and their slots",
        description="Show containers, their slots by state, and rates, until q or Ctrl-C. Changes nothing. Exit code 0, or "
        f"{FAILED} if it can't be shown. Servers' token: SLOTPOOL_TOKEN.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--server", action="append", default=[], metavar="URL", help="a standing server; repeatable")
    parser.add_argument("--token-file", metavar="FILE", help="read the servers' bearer token from there instead")
    parser.add_argument("--cacert", metavar="FILE", help="certificates by which https servers are checked (PEM)")
    options.add_cluster(parser, otherwise_here=True)
    parser.add_argument("--once", action="store_true", help="print it once; so it is where standard output is no terminal")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console, Group
        from rich.live import Live

        from ..top import table
    except ImportError as e:
        raise SlotPoolError(f"top needs rich, which `pip install 'slotpool[cli]'` installs: {e}") from e
    if not 0.1 <= args.interval <= 3600:  # nor is NaN
        raise ConfigError("--interval", "a number of seconds from 0.1 to 3600", str(args.interval))
    if bool(args.server) == (args.nomad is not None):
        raise ConfigError("--server", "either servers or --nomad", "both" if args.server else "neither")
    with _asking(args) as ask:
        console = Console()
        now = ask()
        if args.once or not sys.stdout.isatty():
            if not console.is_terminal:
                console.width = 160
            console.print(table(now, None))
            return 0
        try:
            how = "[dim]q quits[/dim]"
            with _single_keys(), Live(Group(how, table(now, None)), console=console, auto_refresh=False, screen=True) as live:
                live.refresh()
                while not _quit(args.interval):
                    before, now = now, ask()
                    live.update(Group(how, table(now, before)), refresh=True)
        except KeyboardInterrupt:
            pass
    return 0


@contextlib.contextmanager
def _asking(args: argparse.Namespace) -> Iterator[Callable[[], Look]]:
    """What takes a look."""
    with _of_job(args) if args.nomad is not None else _of_servers(args) as ask:
        yield ask


@contextlib.contextmanager
def _of_servers(args: argparse.Namespace) -> Iterator[Callable[[], Look]]:
    from ..config import SlotPoolConfig
    from ..sandbox.client import SandboxClient
    from ..top import look_of
    from ..top import now as clock

    options.require_here(args)
    config = SlotPoolConfig(servers=args.server, token=options.token_of(args.token_file), cacert=args.cacert)
    with contextlib.ExitStack() as stack:
        clients = [SandboxClient(server, config.token, cacert=config.cacert) for server in config.servers]
        for client in clients:
            stack.callback(client.close)
        threads = stack.enter_context(ThreadPoolExecutor(_AT_ONCE, "slotpool-top"))

        def ask() -> Look:
            return look_of(clock(), list(threads.map(_ask, clients)))

        yield ask


def _ask(client: SandboxClient) -> Row:
    from ..top import row_of, silent

    try:
        info = client.health(_LIMIT, repeat=False)
    except SlotPoolError as e:
        return silent("-", client.address, e)
    return row_of(str(info.get("name") or info.get("boot_id", "-")), client.address, info)


@contextlib.contextmanager
def _of_job(args: argparse.Namespace) -> Iterator[Callable[[], Look]]:
    from ..top import Row, look_of, row_of
    from ..top import now as clock
    from .report import look

    config = options.cluster_config(args, token=options.token_of(args.token_file), cacert=args.cacert)
    with job.connected(config) as client:

        def ask() -> Look:
            told = look(client, config)
            rows: Sequence[Row] = [
                row_of(one.allocation.id[:8], one.address or "-", one.info)
                if one.answers
                else Row(id=one.allocation.id[:8], address=one.address or "-", trouble=one.trouble or one.status)
                for one in told.containers
            ]
            notes = [*told.notes, *([str(told.failure)] if told.failure is not None else [])]
            return look_of(clock(), rows, "; ".join([f"job {told.job.id}: {told.answering} of {told.count} answer", *notes]))

        yield ask


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Have keys come without Enter, and unseen, if they come from a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    kept = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, kept)


def _quit(seconds: float) -> bool:
    """Whether q was typed within that time."""
    if not sys.stdin.isatty():
        select.select([], [], [], seconds)
        return False
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready) and sys.stdin.read(1) in ("q", "Q")
