"""A slot's user goes back to its server once, when nothing is left of the slot; also where a sandbox could not be made."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT, wait_until

from slotpool.errors import SandboxStartFailed
from slotpool.sandbox import cell, cgroups, users
from slotpool.sandbox.isolation import Isolation, Place
from slotpool.sandbox.nursery_process import NurseryProcess
from slotpool.sandbox.protocol import RequestFailed
from slotpool.sandbox.tenancies import HostConfig, TenancyMaker


class Given:
    """What a server has given to its slots, each time minus once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.users: Counter[int] = Counter()
        self.groups: Counter[str] = Counter()
        take, give_back = users.UserBlock.take, users.UserBlock.give_back
        make, remove = cgroups.Groups.make, cgroups.Groups.remove

        def taken(block: users.UserBlock) -> int:
            uid = take(block)
            self.users[uid] += 1
            return uid

        def given_back(block: users.UserBlock, uid: int) -> None:
            self.users[uid] -= 1
            give_back(block, uid)

        def made(groups: cgroups.Groups, name: str) -> list[str]:
            files = make(groups, name)
            self.groups[os.path.dirname(files[0])] += 1
            return files

        def removed(groups: cgroups.Groups, name: str) -> None:
            remove(groups, name)
            for root in groups.roots:
                if f"{root}/{name}" in self.groups and not os.path.exists(f"{root}/{name}"):
                    self.groups[f"{root}/{name}"] -= 1

        monkeypatch.setattr(users.UserBlock, "take", taken)
        monkeypatch.setattr(users.UserBlock, "give_back", given_back)
        monkeypatch.setattr(cgroups.Groups, "make", made)
        monkeypatch.setattr(cgroups.Groups, "remove", removed)

    def out(self) -> int:
        """How many users are a slot's."""
        assert set(self.users.values()) <= {0, 1}, "none is given back twice"
        return sum(self.users.values())

    def groups_out(self) -> int:
        return sum(self.groups.values())


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    if not ROOT:
        pytest.skip("only root has users to give")
    return Given(monkeypatch)


@pytest.fixture(params=["user", "bwrap"])
def maker(request: pytest.FixtureRequest, given: Given) -> Iterator[TenancyMaker]:
    made = TenancyMaker(HostConfig(slots=1, isolation=request.param), NurseryProcess())
    try:
        assert given.out() == 0, "the one that was tried out has gone back"
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
def _no_sockets(maker: TenancyMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def none(*args: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", none)
        yield


@contextlib.contextmanager
def _nursery_without_descriptors(maker: TenancyMaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pid = maker._nursery.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (1 + max(map(int, os.listdir(f"/proc/{pid}/fd"))), before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


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


@pytest.mark.parametrize("trouble", [_no_directories, _no_place_inside, _no_sockets, _nursery_without_descriptors])
def test_it_is_given_back_if_no_sandbox_can_be_made(
    maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch, trouble: Any
) -> None:
    slots = maker._slots_dir
    with trouble(maker, monkeypatch):
        for _ in range(3):
            with pytest.raises((SandboxStartFailed, OSError)):
                maker.make(maker.isolation.default_network)
            assert given.out() == 0
            assert os.listdir(slots) == []
    maker.end(maker.make(maker.isolation.default_network))
    assert given.out() == 0
    wait_until(lambda: given.groups_out() == 0)


def test_it_is_given_back_once_however_often_an_end_is_asked_for(maker: TenancyMaker, given: Given) -> None:
    first = maker.make(maker.isolation.default_network)
    maker.end(first)
    maker.end(first)
    assert given.out() == 0


def test_it_is_kept_until_all_processes_are_dead(maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    tenancy = maker.make(maker.isolation.default_network)
    with _stopped_nursery(maker, monkeypatch):
        for _ in range(2):
            with pytest.raises(SandboxStartFailed, match="could not be killed"):
                maker.end(tenancy)
            assert given.out() == 1
    maker.end(tenancy)
    assert given.out() == 0
    assert not os.path.exists(tenancy.place.directory)


def test_a_slot_that_could_not_be_mended_is_given_back_too(
    maker: TenancyMaker, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenancy = maker.make(maker.isolation.default_network)
    with _no_place_inside(maker, monkeypatch), pytest.raises(RequestFailed, match="could not be made"):
        maker.mend(tenancy, tenancy.cell, may_have_run=False)
    assert given.out() == 1
    maker.mend(tenancy, tenancy.cell, may_have_run=False)
    assert tenancy.cell.armed == 1
    maker.end(tenancy)
    assert given.out() == 0


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
        assert given.out() == 1
    maker.end(tenancy)
    assert given.out() == 0
