"""``slotpool serve``."""

from __future__ import annotations

import argparse
import logging
import os

import attr

from ..config import SlotPoolConfig
from ..errors import SlotPoolError
from . import options


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="run a sandbox server",
        description="Serve slots over HTTP until interrupted. Clients need the bearer token in the variable SLOTPOOL_TOKEN; "
        "without one the server listens on loopback only. The address is printed on standard output.",
    )
    parser.set_defaults(run=run)
    options.add_isolation(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument("--port", type=int, default=8080, help="default: %(default)s; 0 for any free one")
    parser.add_argument("--slots", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--state-dir", metavar="DIR", help="where workspaces are kept")
    for name, what in (
        ("max_output", "bytes kept of each of a command's streams"),
        ("max_file_size", "bytes of a file read or written"),
        ("max_processes", "processes of a slot"),
    ):
        default = attr.fields_dict(SlotPoolConfig)[name].default
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{what}; default: %(default)s")
    parser.add_argument("--max-memory", type=int, metavar="MB", help="of a slot; default: as much as there is")
    parser.add_argument("--max-cpus", type=float, metavar="N", help="processors of a slot; default: its even share of all")
    parser.add_argument("--max-written", type=int, metavar="N", help="bytes of each file that a slot's commands write")
    parser.add_argument("--max-disk", type=int, metavar="MB", help="of a slot's files, kept in memory; with isolation bwrap")
    parser.add_argument(
        "--readonly-path", action="append", default=[], metavar="DIR", help="directory that slots see; repeatable"
    )
    parser.add_argument("--token-file", metavar="FILE", help="read the bearer token from there instead")
    parser.add_argument("--tls-cert", metavar="FILE", help="encrypt connections; the certificate, and its issuers', as PEM")
    parser.add_argument("--tls-key", metavar="FILE", help="its key, if that is not in the same file")
    parser.add_argument("--name", default="", help="told in health; for whoever starts many servers")


def run(args: argparse.Namespace) -> int:
    from ..sandbox.serve import ServeConfig, serve
    from ..sandbox.tenancies import HostConfig

    if args.verbose < 2:
        logging.getLogger("slotpool").setLevel(logging.INFO)
    # The same bounds as a pool's, and the same messages.
    checked = SlotPoolConfig(
        backend="local",
        token=options.token_of(args.token_file),
        slots_per_container=args.slots,
        isolation=args.isolation,
        state_dir=args.state_dir and os.path.abspath(args.state_dir),
        max_output=args.max_output,
        max_file_size=args.max_file_size,
        max_processes=args.max_processes,
        max_memory=args.max_memory,
        max_cpus=args.max_cpus,
        max_written=args.max_written,
        max_disk=args.max_disk,
        readonly_paths=args.readonly_path,
    )
    if not 0 <= args.port <= 65535:
        raise SlotPoolError(f"port: expected a number from 0 to 65535, got {args.port}")
    if args.tls_key is not None and args.tls_cert is None:
        raise SlotPoolError("tls-key: expected a certificate beside it, with --tls-cert, got none")
    host = HostConfig(name=args.name, **checked.of_server())
    config = ServeConfig(host, args.host, args.port, checked.token, tls_cert=args.tls_cert, tls_key=args.tls_key)
    serve(config, lambda address: print(address, flush=True))
    return 0
