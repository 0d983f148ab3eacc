"""SlotEnv where gymnasium's own tools take it: its checker, ``make``, wrappers, vectors of environments, other processes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
import pytest
from conftest import servers
from gymnasium.error import CustomSpaceError, ResetNeeded
from gymnasium.spaces import Text
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics

from slotpool import ExecutionResult, Slot, SlotPool, SlotPoolConfig
from slotpool.errors import PoolClosed
from slotpool.gym import AnyText, SlotEnv

# From Python 3.12 on every fork of a process with threads warns.
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def pool() -> Iterator[SlotPool]:
    """One for all tests here, as each finds clean slots in it."""
    with SlotPool(backend="local", slots_per_container=4, max_containers=1, health_check_interval=0.2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _nothing_held(pool: SlotPool) -> Iterator[None]:
    yield
    assert pool.acquired_slots == 0


class Count(SlotEnv):
    """Counts the lines of a file up to three."""

    def set_up(self, slot: Slot, options: Mapping[str, Any]) -> str:
        slot.write_file("lines", options.get("lines", ""))
        return "write three lines\n"

    def reward(self, result: ExecutionResult) -> int:
        return self.slot.read_file("lines").count("\n")

    def is_done(self, result: ExecutionResult) -> bool:
        return self.reward(result) == 3


LINE = "echo line >> lines; echo written"


@pytest.fixture
def registered() -> Iterator[str]:
    gymnasium.register("Count-v0", f"{__name__}:Count", max_episode_steps=4)
    yield "Count-v0"
    del gymnasium.registry["Count-v0"]


def test_the_checker_finds_nothing(pool: SlotPool, registered: str) -> None:
    env = gymnasium.make(registered, pool=pool, render_mode="ansi").unwrapped
    check_env(env)  # its warnings are errors here
    env.close()


def test_made_by_its_name_it_is_limited_and_recorded(pool: SlotPool, registered: str) -> None:
    with RecordEpisodeStatistics(gymnasium.make(registered, pool=pool)) as env:
        with pytest.raises(ResetNeeded):
            env.step("true")
        observation, _ = env.reset(seed=1, options={"lines": "first\n"})
        assert observation == "write three lines\n"
        assert env.step(LINE)[:4] == ("written\n", 2.0, False, False)
        *_, terminated, truncated, info = env.step(LINE)
        assert (terminated, truncated) == (True, False)
        assert (info["episode"]["r"], info["episode"]["l"]) == (5.0, 2)
        env.reset()
        assert [env.step("true")[3] for _ in range(4)] == [False, False, False, True]
        spec = env.spec
        assert spec is not None
        assert spec.kwargs["pool"] is pool
        assert spec.make().unwrapped.get_wrapper_attr("pool") is pool


def test_it_is_rendered_as_text(pool: SlotPool, registered: str) -> None:
    with Count(pool, render_mode="ansi") as env:
        env.reset()
        assert env.render() == "write three lines\n"
        env.step("echo $((6*7)); false")
        assert env.render() == "$ echo $((6*7)); false\n42\n[exit code 1]\n"
    with gymnasium.make(registered, pool=pool, render_mode="ansi_list") as listed:
        listed.reset()
        listed.step("echo 1")
        listed.step("echo 2")
        assert listed.render() == ["write three lines\n", "$ echo 1\n1\n", "$ echo 2\n2\n"]
    with Count(pool) as env:
        env.reset()
        assert env.render() is None


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_many_in_turn(pool: SlotPool, mode: AutoresetMode) -> None:
    envs = SyncVectorEnv([functools.partial(Count, pool) for _ in range(3)], autoreset_mode=mode)
    observations, infos = envs.reset(seed=1, options={"lines": "first\n"})
    assert observations == ("write three lines\n",) * 3
    observations, rewards, terminated, truncated, infos = envs.step((LINE, np.str_("echo two"), "exit 3"))
    assert observations == ("written\n", "two\n", "[exit code 3]\n")
    assert rewards.tolist() == [2, 1, 1]
    assert not terminated.any()
    assert not truncated.any()
    assert [result.exit_code for result in infos["result"]] == [0, 0, 3]
    observations, _, terminated, _, infos = envs.step((LINE, "true", "true"))
    assert terminated.tolist() == [True, False, False]
    if mode is AutoresetMode.NEXT_STEP:
        observations, *_, infos = envs.step(("not run", "true", "true"))
    assert observations == ("write three lines\n", "", "")
    assert infos["steps"].tolist()[0] == 0
    envs.close()
    envs.close()


def test_made_many_at_once_by_its_name(pool: SlotPool, registered: str) -> None:
    envs = gymnasium.make_vec(registered, num_envs=2, vectorization_mode="sync", pool=pool)
    envs.reset(seed=1)
    assert envs.step(["echo 1", "echo 2"])[0] == ("1\n", "2\n")
    assert str(envs) == "SyncVectorEnv(Count-v0, num_envs=2)"
    envs.close()


@forks
def test_in_processes_of_their_own_they_need_pools_of_their_own(pool: SlotPool) -> None:
    before = set(servers())
    config = SlotPoolConfig(slots_per_container=1, max_containers=1)
    envs = AsyncVectorEnv([functools.partial(Count, config) for _ in range(2)], shared_memory=False)
    assert set(servers()) == before, "the one that is made for its spaces starts none"
    envs.reset(seed=1)
    assert len(set(servers()) - before) == 2
    observations, *_, infos = envs.step([LINE, "exit 3"])
    assert observations == ("written\n", "[exit code 3]\n")
    assert [result.exit_code for result in infos["result"]] == [0, 3]
    envs.close()
    assert set(servers()) == before


@forks
@pytest.mark.filterwarnings("ignore:.*ERROR:UserWarning")  # gymnasium tells what was raised in a child in this way too
def test_a_pool_of_the_parent_process_is_refused_in_a_child(pool: SlotPool) -> None:
    envs = AsyncVectorEnv([functools.partial(Count, pool)], shared_memory=False, context="fork")
    with pytest.raises(PoolClosed, match=r"expected the process \d+ .*make a pool of its own"):
        envs.reset()
    envs.close()
    with pool.slot() as s:
        assert s.bash("echo well").stdout == "well\n"


def test_text_is_not_made_numbers_of(pool: SlotPool) -> None:
    space = AnyText(10)
    with pytest.raises(ValueError, match="shared_memory=False"):
        AsyncVectorEnv([functools.partial(SlotEnv, SlotPoolConfig())])
    with pytest.raises(CustomSpaceError, match="numbers"):
        FlattenObservation(SlotEnv(pool))
    assert not space.is_np_flattenable


def test_the_space_holds_every_short_text_and_samples_printable_ones() -> None:
    space = AnyText(10, seed=1)
    assert isinstance(space, Text)
    assert all(text in space for text in ("", "zwölf\n", "\0\ud800", "x" * 10))
    assert all(other not in space for other in ("x" * 11, b"x", None, 5))
    samples = [space.sample() for _ in range(100)]
    assert all(sample in space and (sample + "x").isprintable() and sample.isascii() for sample in samples)
    assert samples == [AnyText(10, seed=1).sample(), *samples[1:]]
    assert len(set(samples)) > 50
    assert space == AnyText(10)
    assert space != AnyText(11)
    assert space != Text(10, min_length=0)
    assert repr(space) == "AnyText(10)"
