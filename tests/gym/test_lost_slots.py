"""An environment whose container is killed, or whose slot is lost otherwise: the reason is told, the next reset works."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Callable

import pytest
from conftest import servers, wait_until

from slotpool import ExecutionResult, LeaseLost, Slot, SlotPool, SlotState
from slotpool.gym import SlotEnv


@pytest.fixture(scope="module")
def pool() -> Iterator[SlotPool]:
    """One container, that comes back after each test."""
    with SlotPool(backend="local", slots_per_container=2, max_containers=1, health_check_interval=0.2) as pool:
        yield pool


def kill_the_server() -> None:
    (server,) = servers()
    os.kill(server, signal.SIGKILL)


class Hooked(SlotEnv):
    """What is lost is lost amid a hook."""

    before: Callable[[str], None]

    def set_up(self, slot: Slot, options: Mapping[str, Any]) -> str:
        number = self.np_random.integers(1_000_000)
        self.before("set_up")
        slot.write_file("number", str(number))
        return str(number)

    def reward(self, result: ExecutionResult) -> float:
        self.before("reward")
        return float(self.slot.bash("cat number").stdout)


def works(env: SlotEnv) -> bool:
    """Whether an episode can be begun and gone through."""
    env.reset()
    return env.step("ls -A; echo on > f; cat f")[0] == "on\n"


def test_a_container_that_is_lost_amid_an_action(pool: SlotPool) -> None:
    with SlotEnv(pool) as env:
        env.reset()
        slot = env.slot

        def kill() -> None:
            assert wait_until(lambda: slot.bash("ls").stdout)
            kill_the_server()

        thread = threading.Thread(target=kill)
        thread.start()
        observation, reward, terminated, truncated, info = env.step("touch begun; sleep 1025")
        thread.join()
        assert (reward, terminated, truncated) == (0.0, False, True)
        assert info["truncated_by"].partition(":")[0] in ("ContainerLost", "LeaseLost")
        assert observation.strip("[]\n") in info["truncated_by"]
        assert not info["result"].success
        assert info["result"].metadata["may_have_run"]
        assert works(env)


def test_a_container_that_is_lost_between_steps(pool: SlotPool) -> None:
    with SlotEnv(pool) as env:
        env.reset()
        kill_the_server()
        *_, truncated, info = env.step("echo on")
        assert truncated
        assert "Lost: " in info["truncated_by"]
        assert info["steps"] == 1
        assert works(env)


def test_a_container_that_is_lost_between_episodes(pool: SlotPool) -> None:
    with SlotEnv(pool, max_steps=1) as env:
        env.reset()
        assert env.step("true")[3]
        slot = env.slot
        kill_the_server()
        assert wait_until(lambda: slot.state is SlotState.ERROR)
        assert works(env)


def test_a_container_that_is_lost_amid_the_set_up(pool: SlotPool) -> None:
    calls: list[str] = []

    def kill_once(hook: str) -> None:
        calls.append(hook)
        if len(calls) == 1:
            kill_the_server()

    with Hooked(pool) as env:
        env.before = lambda hook: None
        expected = env.reset(seed=5)[0]
        env.before = kill_once
        assert env.reset(seed=5)[0] == expected, "it begins anew with the same random numbers"
        assert calls == ["set_up", "set_up"]
        assert env.step("cat number")[0] == expected


def test_slots_that_are_lost_one_after_the_other_are_told(pool: SlotPool) -> None:
    calls: list[str] = []

    def lose(hook: str) -> None:
        calls.append(hook)
        env.slot.release()

    with Hooked(pool) as env:
        env.before = lose
        with pytest.raises(LeaseLost, match="released"):
            env.reset()
        assert calls == ["set_up"] * 3
        env.before = lambda hook: None
        env.reset()
        assert env.step("true")[1] > 0


def test_a_slot_that_is_lost_amid_a_setup_given_to_it(pool: SlotPool) -> None:
    calls: list[str] = []

    def lose_once(slot: Slot) -> None:
        calls.append(slot.slot_id)
        if len(calls) == 1:
            slot.release()
        slot.write_file("made", "")

    with SlotEnv(pool, setup=lose_once) as env:
        env.reset()
        assert env.step("ls")[0] == "made\n"
        assert len(calls) == 2


def test_a_slot_that_is_lost_amid_the_reward_keeps_the_actions_result(pool: SlotPool) -> None:
    with Hooked(pool) as env:
        env.before = lambda hook: None
        env.reset()
        env.before = lambda hook: env.slot.release()
        _, reward, terminated, truncated, info = env.step("echo done")
        assert (reward, terminated, truncated) == (0.0, False, True)
        assert info["result"].stdout == "done\n"
        assert info["truncated_by"].startswith("LeaseLost: ")
        env.before = lambda hook: None
        env.reset()
        assert env.step("true")[1] > 0


def test_an_action_that_breaks_the_reward_ends_the_episode_only(pool: SlotPool) -> None:
    """What an action leaves running may kill what the task runs after it."""

    class Sabotaged(SlotEnv):
        def reward(self, result: ExecutionResult) -> float:
            return float(self.slot.bash("touch here; sleep 1026").exit_code or 0)

    with Sabotaged(pool) as env:
        env.reset()
        _, reward, _, truncated, info = env.step("(until [ -e here ]; do sleep 0.01; done; kill -9 -1) & disown")
        assert (reward, truncated) == (0.0, True)
        assert info["truncated_by"].startswith("SlotBroken: ")
        assert info["result"].success
        assert pool.acquired_slots == 0
        env.reset()
