"""A sandbox server as a child process of a local fleet.

Standard input brings one line of JSON, the fields of :class:`.HostConfig` and ``token parent log_level``, and stays open as
long as the parent wants the server. Standard output takes ``{"ready": address}`` or
``{"failed": name of an exception, "message"}`` as a line; the log goes to standard error.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import NoReturn

from ..errors import SlotPoolError, StartFailed
from .nursery_process import NurseryProcess


def main() -> None:
    try:
        nursery = NurseryProcess()
    except OSError as e:
        _fail(StartFailed(f"the process that makes sandboxes could not be started: {e}"))
    except StartFailed as e:
        _fail(e)
    try:
        _serve(nursery)
    finally:
        nursery.close()


def _fail(error: SlotPoolError) -> NoReturn:
    print(json.dumps({"failed": type(error).__name__, "message": str(error)}), flush=True)
    sys.exit(1)


def _serve(nursery: NurseryProcess) -> None:
    from .serve import ServeConfig, serve  # while the nursery starts, on another core
    from .tenancies import HostConfig

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    line = sys.stdin.buffer.readline()
    if not line:
        return  # the parent died before it could ask for anything
    settings = json.loads(line)
    token, parent = settings.pop("token"), settings.pop("parent")
    logging.getLogger("slotpool").setLevel(settings.pop("log_level", "INFO"))
    settings["readonly_paths"] = tuple(settings["readonly_paths"])
    config = ServeConfig(HostConfig(**settings), listen=None, token=token, parent=parent)
    try:
        serve(config, lambda address: print(json.dumps({"ready": address}), flush=True), nursery)
    except SlotPoolError as e:
        _fail(e)


main()
