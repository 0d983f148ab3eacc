"""Options that several commands have, and the configuration that comes of them."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ..config import ISOLATIONS, SlotPoolConfig
from ..errors import ConfigError, shown

_WORDS = {"True": True, "False": False, "None": None}  # as Python has them, beside JSON's


def add_isolation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--isolation", choices=ISOLATIONS, default="auto", help="default: %(default)s, the strongest that works"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")


def add_cluster(parser: argparse.ArgumentParser, *, otherwise_here: bool) -> None:
    """``--nomad``, ``--job`` and ``--set``.

    :param otherwise_here: without ``--nomad`` the command works on this machine.
    """
    default = "NOMAD_ADDR or http://127.0.0.1:4646"
    if otherwise_here:
        told = f"on a cluster, instead of this machine; default ADDRESS: {default}"
        parser.add_argument("--nomad", nargs="?", const="", metavar="ADDRESS", help=told)
    else:
        parser.add_argument("--nomad", default="", metavar="ADDRESS", help=f"default: {default}")
    parser.add_argument("--job", metavar="ID", help="the job with the containers; default: slotpool-sandbox")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of SlotPoolConfig; VALUE is JSON or else a string; repeatable. Secrets belong in SLOTPOOL_TOKEN "
        "and NOMAD_TOKEN, as a command line is everybody's to read",
    )


def require_here(args: argparse.Namespace) -> None:
    """Without ``--nomad``.

    :raises ConfigError: an option is given that has a meaning only on a cluster.
    """
    for option, value in (("--job", args.job), ("--set", args.set)):
        if value:
            raise ConfigError(option, "--nomad beside it", "none")


def cluster_config(args: argparse.Namespace, defaults: dict[str, Any] | None = None, **given: Any) -> SlotPoolConfig:
    """The configuration for a job.

    :param defaults: what ``--set`` may change.
    :param given: by the command's other options; None is not given.
    :raises ConfigError: a field is unknown, given twice, or can't have that value.
    """
    options = {"backend": "nomad", "nomad_address": args.nomad or None, "job_id": args.job, **given}
    settings = {name: value for name, value in options.items() if value is not None}
    for setting in args.set:
        name, equals, text = setting.partition("=")
        if not name or not equals:
            raise ConfigError("--set", "NAME=VALUE", shown(name))
        if name in settings:
            fixed = name == "backend"
            raise ConfigError(name, "nomad, as this is for a cluster" if fixed else "one value", "a second value")
        settings[name] = _value(text)
    return SlotPoolConfig.make({**(defaults or {}), **settings})


def _value(text: str) -> Any:
    try:
        return _WORDS[text] if text in _WORDS else json.loads(text)
    except (ValueError, RecursionError):
        return text


def token_of(path: str | None) -> str | None:
    """What the file at ``path`` has, or the variable ``SLOTPOOL_TOKEN``.

    :raises ConfigError: it can't be read.
    """
    if path is None:
        return os.environ.get("SLOTPOOL_TOKEN") or None
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError) as e:
        raise ConfigError("token-file", "a file with the token in it", f"{path}: {e}") from e
