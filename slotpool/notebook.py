"""``%load_ext slotpool``: cells of bash that run in a slot."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
from IPython.display import display

from .errors import CommandFailed, LeaseLost, shown
from .pool import SlotPool
from .slot import ExecutionResult, Slot, SlotState

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


@magics_class
class SlotMagics(Magics):
    """``%%slot`` and ``%slot``. For one thread."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self._names = shell.user_ns
        self._own: SlotPool | None = None  # started when it is first needed
        self._kept: dict[SlotPool, Slot] = {}  # from cell to cell

    @magic_arguments()
    @argument("where", nargs="?", help="a variable with a SlotPool or a Slot; default: a pool that is started for the notebook")
    @argument("--new", action="store_true", help="give the kept slot back, with its files, and begin in a clean one")
    @argument("--network", action=argparse.BooleanOptionalAction, help="of a slot that is taken; default: the pool's")
    @argument("--timeout", type=float, metavar="SECONDS", help="for the cell; default: the pool's command_timeout")
    @argument("--check", action="store_true", help="raise CommandFailed if the cell does not succeed, which ends a Run All")
    @argument("--out", metavar="NAME", help="assign the result to a variable, and don't show it")
    @line_cell_magic
    def slot(self, line: str, cell: str | None = None) -> ExecutionResult | Slot | None:
        """Run a cell of bash in a slot. Its result, an ExecutionResult, is the cell's value. As a line, `s = %slot`, it is the
        slot itself.

        A pool's slot is kept from cell to cell, and so are its files and background processes; not `cd` and variables. It
        goes back with --new, with the pool, and with the kernel. If it is lost, the cell that meets this raises LeaseLost,
        and what comes after it begins in a clean slot. Interrupting the kernel ends what the cell has started, and keeps the
        slot.
        """
        args = parse_argstring(self.slot, line)
        if args.out is not None and not args.out.isidentifier():
            raise UsageError(f"--out: expected a variable's name, got {shown(args.out)}")
        slot = self._slot(args, is_told=cell is not None)
        if cell is None:
            return slot
        try:
            result = slot.bash(cell, timeout=args.timeout)
        except LeaseLost:
            self._forget(slot)
            raise
        if args.out is not None:
            self._names[args.out] = result
        if args.check and not result.success:
            if args.out is None:
                display(result)
            raise CommandFailed(result)
        return result if args.out is None else None

    def _slot(self, args: argparse.Namespace, is_told: bool) -> Slot:
        """The one to use: given, kept or taken now.

        :param is_told: using it tells if it was lost.
        """
        where = self._names.get(args.where) if args.where is not None else self._own_pool()
        if isinstance(where, Slot):
            if args.new or args.network is not None:
                raise UsageError(f"--new, --network: expected a pool to take a slot from, got the slot {args.where}")
            return where
        if not isinstance(where, SlotPool):
            raise UsageError(f"expected a variable with a SlotPool or a Slot, got {args.where}, which is {shown(where)}")
        kept = self._kept.get(where)
        unusable = (SlotState.RELEASING,) if is_told else (SlotState.RELEASING, SlotState.ERROR)
        if kept is not None and (args.new or kept.state in unusable):
            self._forget(kept)
            kept = None
        if kept is None:
            kept = self._kept[where] = where.acquire(network=args.network)
        elif args.network not in (None, kept.network):
            has = "has" if kept.network else "has no"
            raise UsageError(f"--network: the slot that is kept {has} network; add --new to begin in another one")
        return kept

    def _own_pool(self) -> SlotPool:
        if self._own is None:
            self._own = SlotPool().start()
        return self._own

    def _forget(self, slot: Slot) -> None:
        self._kept = {pool: kept for pool, kept in self._kept.items() if kept is not slot}
        slot.release()

    def close(self) -> None:
        """Give back what is kept."""
        for slot in list(self._kept.values()):
            self._forget(slot)
        if self._own is not None:
            self._own.stop()
            self._own = None


def load(shell: InteractiveShell) -> None:
    """For ``%load_ext``."""
    shell.register_magics(SlotMagics(shell))


def unload(shell: InteractiveShell) -> None:
    """For ``%unload_ext`` and ``%reload_ext``; ends what the magics have begun."""
    manager = shell.magics_manager
    magics = manager.registry.pop(SlotMagics.__name__, None)
    for kind in ("line", "cell"):
        manager.magics[kind].pop("slot", None)
    if isinstance(magics, SlotMagics):
        magics.close()
