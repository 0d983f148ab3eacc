"""What a slot consists of while it is leased: a sandbox and a workspace; how they are made, mended and ended."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import secrets
import threading
from collections import deque
from typing import Callable

import attr

from ..errors import SandboxStartFailed, StartFailed
from . import cgroups, isolation, killing, linux, restraint, trees
from .cell import Cell, start
from .executions import Executions
from .isolation import Isolation, Limits, Place
from .nursery_process import NurseryProcess
from .protocol import RequestFailed
from .state import StateDirectory
from .tools import Setting
from .users import UserBlock

log = logging.getLogger(__name__)

_MOST_AGAIN = 4  # of what could not be cleared, tried again before a sandbox is made


@attr.s(slots=True, auto_attribs=True, frozen=True)
class HostConfig:
    """What a server's slots are."""

    name: str = ""  # told in health, so that a client knows whether it has reached the server that it means
    slots: int = 10
    isolation: str = "auto"
    max_output: int = 50_000  # bytes kept of each stream
    max_file: int = 256 * 1024 * 1024  # bytes of a file read or written
    file_patience: float = 20.0  # seconds without a byte after which reading or writing one ends: the slot moves them
    quarantine: float = 10.0  # seconds until a slot is tried again that could not be made ready; then twice as long each time
    max_processes: int = 1024  # for each slot
    max_memory: int | None = None  # bytes for each slot
    max_cpus: float | None = None  # processors for each slot
    max_written: int | None = None  # bytes of a file that a slot's own processes write
    max_disk: int | None = None  # bytes of all files of each slot
    readonly_paths: tuple[str, ...] = ()
    state_dir: str | None = None


class Tenancy:
    """One lease's use of a slot: its sandbox, its workspace, its executions. Made before the lease, ended with it."""

    def __init__(self, place: Place, cell: Cell, setting: Setting, device: int | None) -> None:
        """:param device: that its workspace is on; None if that is not known."""
        self.place = place
        self.device = device
        self.cell = cell
        self.setting = setting  # what tools are used in
        self.executions = Executions()
        # Guards the end, and replacing `cell`, which is done once by the first call that finds it broken.
        self.lock = threading.Lock()
        self.ended = False
        self.cleared = False  # nothing of it is left

    def within(self, path: str) -> str:
        """That path of the slot's below its workspace, from there."""
        return path[len(self.setting.workspace) + 1 :]


class TenancyMaker:
    """This server's directory, its users and its nursery. Thread-safe."""

    def __init__(self, config: HostConfig, nursery: NurseryProcess) -> None:
        """Choose the isolation.

        :param nursery: one that was just started, and ends with this.
        :raises IsolationUnavailable, StartFailed: nothing is left then.
        """
        self._config = config
        self._nursery = nursery
        self._serial = itertools.count()
        self._state: StateDirectory | None = None
        self._users: UserBlock | None = None
        self._groups: cgroups.Groups | None = None
        self._etc: list[tuple[str, str]] = []
        self._users_lock = threading.Lock()  # guards the ids that _users gives out
        self._left: deque[tuple[Place, Cell | None]] = deque()  # what could not be cleared when it should have been
        self._told: set[str] = set()  # their directories, once the log has them
        try:
            directory = self._begin()
            self.socket_path = os.path.join(directory, "http.sock")
            self._slots_dir = os.path.join(directory, "slots")
            os.mkdir(self._slots_dir, 0o711)
            # With max_disk each slot has a file system of its own.
            self._device = os.stat(self._slots_dir).st_dev if config.max_disk is None else None
            if config.isolation in ("auto", "bwrap"):
                self._etc = isolation.make_etc(os.path.join(directory, "etc"))
            self.isolation = isolation.choose(config.isolation, self._try_out, self._limits(), config.readonly_paths)
            self._restrained = self.isolation.mode != "none" and restraint.is_possible()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> str:
        """The server's directory."""
        # First, as it kills what servers have left running, which could make files as fast as what they have left is removed.
        if os.geteuid() == 0 and self._config.isolation != "none":
            self._users = UserBlock()
        self._groups = self._find_groups()
        self._state = StateDirectory(self._config.state_dir)
        # The nursery keeps these locks too, so that nobody takes over what it still has to clear when this process dies.
        locks = [self._state.lock, *(self._groups.locks if self._groups is not None else [])]
        locks += [self._users.fd] if self._users is not None else []
        self._nursery.begin(self._state.path, self._groups.roots if self._groups is not None else (), locks)
        return self._state.path

    def _find_groups(self) -> cgroups.Groups | None:
        """Control groups, if they can be had: also where nothing is limited, as slots then share the processors evenly.

        :raises StartFailed: a limit that only they can keep is asked for.
        """
        config = self._config
        try:
            return cgroups.find(config.max_memory, config.max_cpus, [self._nursery.pid])
        except OSError as e:
            if config.max_cpus is not None:
                raise StartFailed(f"max_cpus: expected control groups that this server may write, got none: {e}") from e
            log.info("no control groups can be had: %s", e)
            return None

    def _limits(self) -> Limits:
        config = self._config
        asked_for = {}
        if config.max_memory is not None and self._groups is None:
            asked_for["RLIMIT_DATA"] = config.max_memory
        if config.max_written is not None:
            asked_for["RLIMIT_FSIZE"] = config.max_written
        return Limits(config.max_processes, config.max_disk, asked_for)

    @property
    def limits(self) -> dict[str, str]:
        """By what each kind of limit is kept; ``none`` for what is not limited."""
        by_group = f"cgroup v{self._groups.version}" if self._groups is not None else "none"
        by_process = self.isolation.rlimits
        return {
            "processes": "rlimit" if "RLIMIT_NPROC" in by_process else "none",
            "open_files": "rlimit" if "RLIMIT_NOFILE" in by_process else "none",
            "memory": "rlimit" if "RLIMIT_DATA" in by_process else by_group if self._config.max_memory is not None else "none",
            "cpu": by_group if self._config.max_cpus is not None else "none",
            "cpu_share": by_group if self._groups is not None else "SCHED_IDLE" if self._restrained else "none",
            "file_size": "rlimit" if "RLIMIT_FSIZE" in by_process else "none",
            "disk": "tmpfs" if self._config.max_disk is not None else "none",
            "wall_time": "timeout",
        }

    def wait(self) -> None:
        """Wait until the nursery has ended."""
        self._nursery.wait()

    def close(self) -> None:
        """End every sandbox, remove every file."""
        if self._state is not None:
            self._state.release()
        self._nursery.close()
        while self._left:
            _, cell = self._left.popleft()
            if cell is not None:
                cell.destroy()
        own = self._nursery.has_failed and linux.is_child_subreaper()
        if own and not killing.kill_descendants(self._nursery.others):
            log.error("what the process that makes sandboxes has left could not be killed")
        if self._groups is not None:
            self._groups.close()
        if self._users is not None:
            self._users.clear()  # nobody is left, unless the nursery was killed
            self._users.close()
        if self._state is not None:
            self._state.tidy()

    def _try_out(self, candidate: Isolation) -> None:
        place = self._make_place(candidate, candidate.default_network)
        self._bury(place, self._fill(place, candidate))

    def _make_place(self, chosen: Isolation, network: bool) -> Place:
        uid, gid, killer = os.geteuid(), os.getegid(), -1
        if chosen.own_users:
            assert self._users is not None
            killer = self._users.killer
            with self._users_lock:
                uid = gid = self._users.take()
        directory = os.path.join(self._slots_dir, f"{next(self._serial)}-{secrets.token_hex(4)}")
        place = Place(directory, self._etc, uid, gid, killer, network)
        try:
            if self._groups is not None:
                place = attr.evolve(place, groups=tuple(self._groups.make(os.path.basename(directory))))
            self._make_directories(place, chosen)
        except BaseException:
            self._discard(place)
            raise
        return place

    def _make_directories(self, place: Place, chosen: Isolation) -> None:
        # A slot can open its workspace to everybody, but not the way to it.
        os.mkdir(place.directory, 0o710)
        if place.uid != os.geteuid():
            os.chown(place.directory, -1, place.gid)
            os.chmod(place.directory, 0o710)
        for path in (place.workspace,) if chosen.mode == "bwrap" else (place.workspace, place.tmp):
            os.mkdir(path, 0o700)
            if place.uid != os.geteuid():
                os.chown(path, place.uid, place.gid)

    def _fill(self, place: Place, chosen: Isolation) -> Cell:
        """A sandbox in ``place``, which is discarded if there can be none.

        :raises SandboxStartFailed, OSError:
        """
        cell = None
        try:
            cell = start(self._nursery, chosen.order(place))
            cell.wait_ready()
        except BaseException:
            self._discard(place, cell)
            raise
        return cell

    def make(self, network: bool) -> Tenancy:
        """A fresh sandbox with an empty workspace, a shell waiting in it unless none could be started.

        :raises SandboxStartFailed, OSError: what is left then is seen to.
        """
        self._try_again()
        place = self._make_place(self.isolation, network)
        cell = self._fill(place, self.isolation)
        cell.arm()
        workspace = self.isolation.workspace(place)
        setting = Setting(workspace, self.isolation.mode, network, self._config.max_output, self._config.max_file)
        return Tenancy(place, cell, setting, self._device)

    def mend(self, tenancy: Tenancy, broken: Cell, may_have_run: bool) -> None:
        """Give a lease new processes in its old workspace; nothing if another call has done it already.

        :param may_have_run: whether the call that found it broken had been started.
        :raises RequestFailed: that could not be done.
        """
        with tenancy.lock:
            if tenancy.ended or tenancy.cell is not broken:
                return
            if not broken.destroy():
                log.error("processes of a broken sandbox could not be killed: %s", tenancy.place.directory)
                # Its calls go on failing, and at the lease's end the slot is quarantined, unless they are dead by then.
                why = "the slot's processes were lost, and what is left of them could not be killed"
                raise RequestFailed("slot_broken", why, may_have_run=may_have_run)
            try:
                fresh = start(self._nursery, self.isolation.order(tenancy.place))
                try:
                    fresh.wait_ready()
                except BaseException:
                    tenancy.cell = fresh  # broken as well, but it is the one now that has to be dead at the lease's end
                    fresh.destroy()
                    raise
            except (SandboxStartFailed, OSError) as e:
                raise RequestFailed("slot_broken", str(e), may_have_run=may_have_run) from e
            fresh.arm()
            tenancy.cell = fresh

    def end(self, tenancy: Tenancy) -> None:
        """Kill every process, make sure of that, and empty the workspace. Repeatable.

        :raises SandboxStartFailed, OSError: if that could not be done.
        """
        with tenancy.lock:  # a reset and a release may meet here
            tenancy.ended = True
            if tenancy.cleared:  # its user may be another's by now
                return
            self._bury(tenancy.place, tenancy.cell, functools.partial(self._begin_to_empty, tenancy.place))
            tenancy.cleared = True

    def discard(self, tenancy: Tenancy) -> None:
        """:meth:`end` one that nobody has had; later, if that can't be done now."""
        self._discard(tenancy.place, tenancy.cell)

    def _discard(self, place: Place, cell: Cell | None = None) -> None:
        try:
            self._bury(place, cell)
        except (SandboxStartFailed, OSError) as e:
            self._keep(place, cell, e)

    def _keep(self, place: Place, cell: Cell | None, trouble: Exception) -> None:
        if place.directory not in self._told:
            log.warning("%s can't be cleared now, and is tried again: %s", place.directory, trouble)
            self._told.add(place.directory)
        self._left.append((place, cell))

    def _try_again(self) -> None:
        """To clear what could not be."""
        for _ in range(min(len(self._left), _MOST_AGAIN)):
            try:
                place, cell = self._left.popleft()
            except IndexError:  # another thread was quicker
                return
            self._discard(place, cell)

    def _bury(self, place: Place, cell: Cell | None, meanwhile: Callable[[], None] = lambda: None) -> None:
        if cell is not None and not cell.destroy(meanwhile):
            raise SandboxStartFailed("its processes could not be killed")
        self._clear(place)

    def _begin_to_empty(self, place: Place) -> None:
        """While its processes die, which may be in the way, or make what is not seen any more."""
        try:
            self._empty(place)
        except OSError:
            log.debug("%s could not be emptied at once", place.directory, exc_info=True)

    def _empty(self, place: Place) -> None:
        trees.empty_trees(place.directory, place.own)

    def _clear(self, place: Place) -> None:
        """Empty it, and see that it is empty. No process is in it.

        What it was made of is removed in a moment, and costs as much as all else that lies between two leases. Until then its
        user has no other lease, and nobody else can get at it.
        """
        self._empty(place)
        self._nursery.undertaker.take(functools.partial(self._remove, place))

    def _remove(self, place: Place) -> None:
        try:
            trees.remove_tree(place.directory)
            if self._groups is not None:
                self._groups.remove(os.path.basename(place.directory))
        except OSError as e:
            self._keep(place, None, e)
            return
        self._told.discard(place.directory)
        if self._users is not None:
            with self._users_lock:
                self._users.give_back(place.uid)
