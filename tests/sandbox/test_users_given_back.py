"""A slot's user goes back to its server once, when nothing is left of the slot; also where a sandbox could not be made."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import resource
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cells import zygotes
from conftest import ROOT, wait_until

from slotpool.errors import SandboxStartFailed
from slotpool.sandbox import cell, cgroups, linux, trees, undertaker, users
from slotpool.sandbox.isolation import Isolation, Place
from slotpool.sandbox.nursery_process import NurseryProcess
from slotpool.sandbox.protocol import RequestFailed
from slotpool.sandbox.tenancies import HostConfig, Tenancy, TenancyMaker


class Given:
    """What a server has given to its slots, each time minus once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.users: Counter[int] = Counter()
        take, give_back = users.UserBlock.take, users.UserBlock.give_back

        def taken(block: users.UserBlock) -> int:
            uid = take(block)
            self.users[uid] += 1
            return uid

        def given_back(block: users.UserBlock, uid: int) -> None:
            self.users[uid] -= 1
            give_back(block, uid)

        monkeypatch.setattr(users.UserBlock, "take", taken)
        monkeypatch.setattr(users.UserBlock, "give_back", given_back)

    def out(self, maker: TenancyMaker) -> int:
        """How many users are a slot's, when all is removed that is to be."""
        settle(maker)
        assert set(self.users.values()) <= {0, 1}, "none is given back twice"
        return sum(self.users.values())


def settle(maker: TenancyMaker) -> None:
    """What is done a moment later is done."""
    done = threading.Event()
    maker._nursery.undertaker.take(done.set)
    assert done.wait(10)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    if not ROOT:
        pytest.skip("only root has users to give")
    return Given(monkeypatch)


@pytest.fixture(params=["user", "bwrap"])
def maker(request: pytest.FixtureRequest, given: Given) -> Iterator[TenancyMaker]:
    made = TenancyMaker(HostConfig(slots=1, isolation=request.param), NurseryProcess())
    try:
        assert given.out(made) == 0, "the one that was tried out has gone back"
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def _no_directories(maker: TenancyMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    mkdir = os.mkdir

    def full(path: str, mode: int = 0o777) -> None:
        if os.path.basename(path) == "workspace":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        yield


@contextlib.contextmanager
def _no_place_inside(maker: TenancyMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The sandbox begins to stand, and ends where it would go to its workspace."""
    order = Isolation.order

    def lost(isolation: Isolation, place: Place) -> Any:
        return {**order(isolation, place), "workspace": "/nowhere"}

    with monkeypatch.context() as patch:
        patch.setattr(Isolation, "order", lost)
        yield


@contextlib.contextmanager
def _no_descriptors(maker: TenancyMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not even for looking whether anything is left of a place."""
    settle(maker)
    with contextlib.ExitStack() as stack:
        most = 1 + max(map(int, os.listdir("/proc/self/fd")))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
        with contextlib.suppress(OSError):
            while True:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


@contextlib.contextmanager
def _limited_nursery(maker: TenancyMaker, most: int) -> Iterator[None]:
    pid = maker._nursery.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def _descriptors(pid: int) -> dict[int, str]:
    return {int(name): os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}


@contextlib.contextmanager
def _nursery_without_descriptors(maker: TenancyMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It has no more than it needs to be asked."""
    fillers = []  # of gaps below its reserve
    pid = maker._nursery.pid
    while True:
        assert wait_until(lambda: linux.stat_fields(f"/proc/{pid}")[0] == b"S"), "it has closed what it does not need any more"
        has = _descriptors(pid)
        most = 1 + max(fd for fd, of in has.items() if of == os.devnull)
        gaps = most - sum(fd < most for fd in has)
        if gaps < 2:
            break
        fillers.append(maker.make(maker.isolation.default_network))
    with _limited_nursery(maker, most):
        with pytest.raises(SandboxStartFailed, match="as many descriptors as it may have"):
            maker.make(maker.isolation.default_network)
        yield
    for filler in fillers:
        maker.end(filler)


@contextlib.contextmanager
def _stopped_nursery(maker: TenancyMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing begins or ends to stand, and whoever waits for it is soon out of patience."""
    os.kill(maker._nursery.pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cell, "START_LIMIT", 0.05)
            patch.setattr(cell, "DEATH_LIMIT", 0.05)
            yield
    finally:
        os.kill(maker._nursery.pid, signal.SIGCONT)


@contextlib.contextmanager
def _nobody_dies(maker: TenancyMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is in a sandbox is not seen to its end, by the nursery or, where that is not asked, by who traces it."""
    if maker.isolation.mode == "user":
        with _stopped_nursery(maker, monkeypatch):
            yield
        return
    (zygote,) = zygotes(maker._nursery.pid)
    seize = 0x4206
    if ctypes.CDLL(None).ptrace(seize, zygote, None, None) != 0:
        pytest.skip("nobody may be traced here")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cell, "DEATH_LIMIT", 0.05)
            yield
    finally:
        os.kill(zygote, signal.SIGKILL)  # if it was not yet
        os.waitpid(zygote, 0)


def _use_one(maker: TenancyMaker) -> None:
    maker.end(maker.make(maker.isolation.default_network))


def _is_given_back(maker: TenancyMaker, given: Given) -> bool:
    """What is left is tried again before one more is made."""
    _use_one(maker)
    return given.out(maker) == 0


@pytest.mark.parametrize("trouble", [_no_directories, _no_place_inside, _nursery_without_descriptors])
def test_it_is_given_back_if_no_sandbox_can_be_made(
    maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch, trouble: Any
) -> None:
    with trouble(maker, monkeypatch):
        before = given.out(maker), os.listdir(maker._slots_dir)
        for _ in range(3):
            with pytest.raises((SandboxStartFailed, OSError)):
                maker.make(maker.isolation.default_network)
            assert (given.out(maker), os.listdir(maker._slots_dir)) == before
    _use_one(maker)
    assert given.out(maker) == 0


def test_it_is_given_back_later_if_that_is_impossible_too(
    maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _no_descriptors(maker, monkeypatch):
        for _ in range(3):
            with pytest.raises(OSError, match="Too many open files"):
                maker.make(maker.isolation.default_network)
    assert given.out(maker) == 3
    _use_one(maker)
    assert given.out(maker) == 0
    assert os.listdir(maker._slots_dir) == []


def test_it_is_given_back_once_what_did_not_stand_in_time_is_dead(
    maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _stopped_nursery(maker, monkeypatch):
        for _ in range(3):
            with pytest.raises(SandboxStartFailed, match="did not stand"):
                maker.make(maker.isolation.default_network)
    assert given.out(maker) == 3

    assert wait_until(lambda: _is_given_back(maker, given))
    assert os.listdir(maker._slots_dir) == []


def _is_ended(maker: TenancyMaker, tenancy: Tenancy, given: Given) -> bool:
    with contextlib.suppress(SandboxStartFailed):
        maker.end(tenancy)
        return given.out(maker) == 0
    return False


_KILLED_AMID = """
for word; do [ "$before" != --info-fd ] || info=$word; before=$word; done
exec {info}>&-
sleep 1043 &
kill -KILL $$
"""


def test_it_is_kept_while_a_child_of_a_killed_bubblewrap_is_left(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = TenancyMaker(HostConfig(slots=1, isolation="bwrap"), NurseryProcess())
    try:
        order = Isolation.order
        with monkeypatch.context() as patch:
            patch.setattr(Isolation, "order", lambda *of: {**order(*of), "bwrap": ["/bin/bash", "-c", _KILLED_AMID, "killed"]})
            patch.setattr(cell, "START_LIMIT", 0.5)
            patch.setattr(cell, "DEATH_LIMIT", 0.05)
            with pytest.raises(SandboxStartFailed, match="did not stand"):
                maker.make(network=False)
        _use_one(maker)
        assert given.out(maker) == 1
        (uid,) = (uid for uid, count in given.users.items() if count)
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if os.stat(f"/proc/{pid}").st_uid == uid:
                    os.kill(int(pid), signal.SIGKILL)
        assert wait_until(lambda: _is_given_back(maker, given))
    finally:
        maker.close()


_STUCK_AMID = """
for word; do [ "$before" != --info-fd ] || info=$word; before=$word; done
sleep 1044 &
echo "{\\"child-pid\\": $!" >&$info
echo "}" >&$info
exec {info}>&-
wait
"""


@pytest.mark.parametrize("maker", ["bwrap"], indirect=True)
def test_it_is_given_back_once_a_bubblewrap_that_does_not_get_on_is_killed(
    maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Isolation.order
    with monkeypatch.context() as patch:
        patch.setattr(Isolation, "order", lambda *of: {**order(*of), "bwrap": ["/bin/bash", "-c", _STUCK_AMID, "stuck"]})
        patch.setattr(cell, "START_LIMIT", 0.5)
        with pytest.raises(SandboxStartFailed, match="did not stand"):
            maker.make(network=False)
    assert given.out(maker) == 0


def _no_groups(*of: Any) -> cgroups.Groups:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("groups", [True, False])
def test_what_can_not_be_cleared_up_is_tried_again(given: Given, monkeypatch: pytest.MonkeyPatch, groups: bool) -> None:
    if not groups:
        monkeypatch.setattr(cgroups, "find", _no_groups)  # so that the nursery looks after processors, and can't
    maker = TenancyMaker(HostConfig(slots=1, isolation="user"), NurseryProcess())
    left = Path("/var/tmp", os.path.basename(os.path.dirname(maker.socket_path)))
    try:
        tenancy = maker.make(network=True)
        left.touch()
        os.chown(left, tenancy.place.uid, -1)
        has = _descriptors(maker._nursery.pid)
        with monkeypatch.context() as patch, _limited_nursery(maker, next(fd for fd in itertools.count() if fd not in has)):
            patch.setattr(cell, "DEATH_LIMIT", 0.5)
            with pytest.raises(SandboxStartFailed, match="could not be killed"):
                maker.end(tenancy)
            assert given.out(maker) == 1

        assert wait_until(lambda: _is_ended(maker, tenancy, given))
        assert not left.exists()
    finally:
        left.unlink(missing_ok=True)
        maker.close()


def test_its_files_are_gone_sooner_than_the_place_for_them_which_is_tried_again(
    maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tenancy = maker.make(maker.isolation.default_network)
    (Path(tenancy.place.workspace) / "inner").mkdir()
    (Path(tenancy.place.workspace) / "inner" / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(trees, "remove_tree", full)
        maker.end(tenancy)
        assert os.listdir(tenancy.place.workspace) == []
        assert given.out(maker) == 1
    _use_one(maker)
    assert given.out(maker) == 0
    assert os.listdir(maker._slots_dir) == []


def test_at_its_end_a_server_removes_what_it_has_left_for_later_before_its_nursery_removes_all(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undertaker, "_PAUSE", 3600.0)
    maker = TenancyMaker(HostConfig(slots=1, isolation="user"), NurseryProcess())
    remove_tree = trees.remove_tree
    beside: list[bool] = []

    def removed(path: str) -> None:
        if os.path.dirname(path) == maker._slots_dir:
            beside.append(maker._nursery._process.poll() is None)
        remove_tree(path)

    try:
        _use_one(maker)
        monkeypatch.setattr(trees, "remove_tree", removed)
    finally:
        maker.close()
    assert beside == [True, True], "of the sandbox that was tried out, and of that one"
    assert sum(given.users.values()) == 0


def test_it_is_given_back_once_however_often_an_end_is_asked_for(maker: TenancyMaker, given: Given) -> None:
    first = maker.make(maker.isolation.default_network)
    maker.end(first)
    maker.end(first)
    assert given.out(maker) == 0


def test_it_is_kept_until_all_processes_are_dead(maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    tenancy = maker.make(maker.isolation.default_network)
    with _nobody_dies(maker, monkeypatch):
        for _ in range(2):
            with pytest.raises(SandboxStartFailed, match="could not be killed"):
                maker.end(tenancy)
            assert given.out(maker) == 1
    assert wait_until(lambda: _is_ended(maker, tenancy, given))
    assert not os.path.exists(tenancy.place.directory)


def test_a_slot_that_could_not_be_mended_is_given_back_too(
    maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenancy = maker.make(maker.isolation.default_network)
    with _no_place_inside(maker, monkeypatch), pytest.raises(RequestFailed, match="could not be made"):
        maker.mend(tenancy, tenancy.cell, may_have_run=False)
    assert given.out(maker) == 1
    maker.mend(tenancy, tenancy.cell, may_have_run=False)
    assert tenancy.cell.armed == 1
    maker.end(tenancy)
    assert given.out(maker) == 0


def test_it_is_kept_until_what_was_to_mend_the_slot_is_dead_too(
    maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenancy = maker.make(maker.isolation.default_network)
    assert tenancy.cell.destroy()
    with _stopped_nursery(maker, monkeypatch):
        with pytest.raises(RequestFailed, match="did not stand"):
            maker.mend(tenancy, tenancy.cell, may_have_run=False)
        with pytest.raises(SandboxStartFailed, match="could not be killed"):
            maker.end(tenancy)
        assert given.out(maker) == 1
    assert wait_until(lambda: _is_ended(maker, tenancy, given))
