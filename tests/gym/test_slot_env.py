"""SlotEnv by itself: episodes, what a task overrides, what ends an episode, what follows what went wrong, and threads."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import OURS, servers, sleepers, wait_until
from gymnasium.error import InvalidAction, ResetNeeded

from slotpool import ExecutionResult, InvalidRequest, Slot, SlotPool, SlotPoolConfig
from slotpool.errors import IsolationUnavailable, PoolClosed, SetupFailed
from slotpool.gym import SlotEnv


@pytest.fixture(scope="module")
def pool() -> Iterator[SlotPool]:
    """One for all tests here, as each finds clean slots in it."""
    with SlotPool(backend="local", slots_per_container=4, max_containers=1, health_check_interval=0.2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _nothing_held(pool: SlotPool) -> Iterator[None]:
    yield
    assert pool.acquired_slots == 0


class Guess(SlotEnv):
    """A number is to be written to a file."""

    calls: list[str]

    def set_up(self, slot: Slot, options: Mapping[str, Any]) -> str:
        self.number = options.get("number", int(self.np_random.integers(1_000_000)))
        slot.write_file("hint", str(self.number))
        self.calls = []
        return f"write {self.number} to answer"

    def observe(self, result: ExecutionResult) -> str:
        self.calls.append("observe")
        return super().observe(result)

    def reward(self, result: ExecutionResult) -> float:
        self.calls.append("reward")
        return float(self._is_right())

    def is_done(self, result: ExecutionResult) -> bool:
        self.calls.append("is_done")
        return self._is_right()

    def _is_right(self) -> bool:
        return self.slot.bash("cat answer").stdout.strip() == str(self.number)


def test_it_works_as_it_is(pool: SlotPool) -> None:
    with SlotEnv(pool) as env:
        assert env.reset() == ("", {"steps": 0})
        observation, reward, terminated, truncated, info = env.step("echo out; echo err >&2; touch f; exit 3")
        assert (observation, reward, terminated, truncated) == ("out\nerr\n[exit code 3]\n", 0.0, False, False)
        assert (info["result"].stdout, info["result"].stderr, info["result"].exit_code) == ("out\n", "err\n", 3)
        assert (info["steps"], set(info)) == (1, {"steps", "result"})
        observation, *_, info = env.step("printf $PWD; ls")
        assert (observation, info["steps"]) == (f"{env.slot.workspace_dir}f\n", 2)
        assert env.step("printf x; kill $$")[0] == "x\n[exit code 143]\n"
        assert pool.acquired_slots == 1
    assert pool.acquired_slots == 0


def test_every_episode_begins_in_a_clean_slot(pool: SlotPool) -> None:
    slots = []
    with SlotEnv(pool, setup="echo once >> made") as env:
        for _ in range(6):
            env.reset()
            slots.append(env.slot.slot_id)
            assert env.step("cat made; ls; pgrep -c sleep")[0] == "once\nmade\n0\n[exit code 1]\n"
            env.step(f"echo junk >> made; touch junk; setsid sleep 1020{OURS} & disown")
    assert len(slots) > len(set(slots)), "one has been used again"
    assert wait_until(lambda: sleepers("1020") == 0)


def test_a_task_sets_up_observes_rewards_and_ends(pool: SlotPool) -> None:
    with Guess(pool) as env:
        observation, _ = env.reset(options={"number": 17})
        assert observation == "write 17 to answer"
        assert env.step("cat hint; echo 18 > answer")[:4] == ("17", 0.0, False, False)
        assert env.step("cp hint answer")[:4] == ("", 1.0, True, False)
        assert env.calls == ["observe", "reward", "is_done"] * 2
        assert env.slot.read_file("answer") == "17", "it can be looked at until the next reset"
        with pytest.raises(ResetNeeded, match=r"terminated; call reset"):
            env.step("true")
        env.reset()
        assert not env.step("true")[2]


def test_a_seed_decides_what_is_random(pool: SlotPool) -> None:
    with Guess(pool) as env, Guess(pool) as other:
        first, second = env.reset(seed=1)[0], env.reset()[0]
        assert first != second
        assert (other.reset(seed=1)[0], other.reset()[0]) == (first, second)
        assert other.reset(seed=2)[0] != first


def test_steps_run_out(pool: SlotPool) -> None:
    with SlotEnv(pool, max_steps=2) as env:
        for _ in range(2):
            env.reset()
            assert not env.step("true")[3]
            *_, terminated, truncated, info = env.step("true")
            assert (terminated, truncated, info["truncated_by"]) == (False, True, "max_steps")
            with pytest.raises(ResetNeeded, match="max_steps"):
                env.step("true")


def test_a_task_that_is_done_with_its_last_step_is_not_truncated(pool: SlotPool) -> None:
    with Guess(pool, max_steps=1) as env:
        env.reset()
        *_, terminated, truncated, info = env.step("cp hint answer")
        assert (terminated, truncated, set(info)) == (True, False, {"steps", "result"})


def test_time_runs_out_amid_a_step(pool: SlotPool) -> None:
    with SlotEnv(pool, max_seconds=2) as env:
        env.reset()
        observation, _, terminated, truncated, info = env.step("echo begun; sleep 10; echo late")
        assert (observation, terminated, truncated) == ("begun\n[timed out]\n", False, True)
        assert info["truncated_by"] == "max_seconds"
        assert info["result"].timed_out
        env.reset()
        assert not env.step("true")[3], "an episode has a time of its own"


def test_time_runs_out_between_steps_and_nothing_is_run_then(pool: SlotPool) -> None:
    with SlotEnv(pool, max_seconds=0.05) as env:
        env.reset()
        time.sleep(0.06)
        observation, _, _, truncated, info = env.step("touch f")
        assert truncated
        assert (observation, info["truncated_by"]) == ("[not run: the episode's time is up]\n", "max_seconds")
        assert info["result"].timed_out
        assert env.slot.bash("ls").stdout == ""


def test_an_action_that_takes_too_long_ends_and_the_episode_goes_on(pool: SlotPool) -> None:
    with SlotEnv(pool, command_timeout=1) as env:
        env.reset()
        observation, _, _, truncated, info = env.step("echo begun; sleep 1022")
        assert (observation, truncated, info["result"].timed_out) == ("begun\n[timed out]\n", False, True)
        assert env.step("echo on")[0] == "on\n"


@pytest.mark.parametrize("action", ["kill -9 -1; sleep 1027", "echo \0", "echo \ud800"], ids=["kills-all", "null", "surrogate"])
def test_whatever_an_action_does_is_in_its_result(pool: SlotPool, action: str) -> None:
    with SlotEnv(pool) as env:
        env.reset()
        observation, _, terminated, truncated, info = env.step(action)
        assert (info["result"].success, terminated, truncated) == (False, False, False)
        assert observation.endswith("]\n")
        assert env.step("echo on")[0] == "on\n"


@pytest.mark.parametrize("action", [5, None, b"true", "x" * 21])
def test_what_is_no_action_is_refused_and_costs_no_step(pool: SlotPool, action: Any) -> None:
    with SlotEnv(pool, max_action_length=20) as env:
        env.reset()
        with pytest.raises(InvalidAction, match="at most 20 characters"):
            env.step(action)
        assert env.step("echo on")[4]["steps"] == 1


def test_a_long_observation_keeps_its_head_and_tail(pool: SlotPool) -> None:
    with SlotEnv(pool, max_length=100) as env:
        env.reset()
        observation, *_, info = env.step("echo head; seq 1000; echo tail")
        assert len(observation) == 100
        assert observation in env.observation_space
        assert observation.startswith("head\n1\n")
        assert observation.endswith("1000\ntail\n")
        left_out = int(observation.partition("[... ")[2].partition(" ")[0])
        kept = 100 - len(f"\n[... {left_out} characters left out ...]\n")
        assert left_out + kept == len(info["result"].output)
    with SlotEnv(pool, max_length=3) as env:
        env.reset()
        assert env.step("echo 12345")[0] == "123"


def test_without_a_reset_there_is_nothing_to_step_in(pool: SlotPool) -> None:
    env = SlotEnv(pool)
    with pytest.raises(ResetNeeded, match=r"new; call reset\(\)"):
        env.step("true")
    with pytest.raises(ResetNeeded, match="has a slot"):
        _ = env.slot
    env.close()


def test_closing_gives_the_slot_back_and_can_be_repeated(pool: SlotPool) -> None:
    env = SlotEnv(pool)
    env.reset()
    for _ in range(2):
        env.close()
        assert pool.acquired_slots == 0
        with pytest.raises(ResetNeeded, match="closed"):
            env.step("true")
    env.reset()
    assert env.step("echo anew")[0] == "anew\n"
    env.close()


def test_an_environment_that_is_dropped_gives_its_slot_back(pool: SlotPool) -> None:
    env = SlotEnv(pool)
    env.reset()
    del env
    gc.collect()
    assert wait_until(lambda: pool.acquired_slots == 0)


def test_what_a_tasks_own_code_raises_is_raised_and_a_reset_helps(pool: SlotPool) -> None:
    class Faulty(SlotEnv):
        broken = ""

        def set_up(self, slot: Slot, options: Mapping[str, Any]) -> str:
            if self.broken == "set_up":
                raise ZeroDivisionError
            return "well"

        def reward(self, result: ExecutionResult) -> float:
            return 1 / (self.broken != "reward")

    with Faulty(pool) as env:
        env.reset()
        env.broken = "reward"
        with pytest.raises(ZeroDivisionError):
            env.step("touch f")
        env.broken = ""
        assert env.step("ls")[0] == "f\n", "the episode goes on"
        env.broken = "set_up"
        with pytest.raises(ZeroDivisionError):
            env.reset()
        with pytest.raises(ResetNeeded, match="has failed"):
            env.step("true")
        env.broken = ""
        assert env.reset()[0] == "well"
        assert env.step("ls")[0] == ""
        assert pool.acquired_slots == 1


def test_an_observation_that_is_no_text_is_told(pool: SlotPool) -> None:
    class Numbers(SlotEnv):
        def observe(self, result: ExecutionResult) -> str:
            return result.exit_code  # type: ignore[return-value]

    with Numbers(pool) as env:
        env.reset()
        with pytest.raises(TypeError, match=r"Numbers\.observe: expected .* str, got 0"):
            env.step("true")


def test_a_setup_that_fails_is_told(pool: SlotPool) -> None:
    with SlotEnv(pool, setup=["true", "exit 3"]) as env:
        with pytest.raises(SetupFailed, match="step 2 of 2"):
            env.reset()
        with pytest.raises(ResetNeeded, match="has failed"):
            env.step("true")
        assert pool.acquired_slots == 0


def test_ctrl_c_ends_the_action_and_the_episode_goes_on(pool: SlotPool) -> None:
    with SlotEnv(pool) as env:
        env.reset()
        slot = env.slot

        def interrupt() -> None:
            assert wait_until(lambda: slot.bash("ls").stdout)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            env.step("touch begun; sleep 1023")
        thread.join()
        assert env.step("ls; pgrep -c sleep")[0] == "begun\n0\n[exit code 1]\n"
    assert pool.acquired_slots == 0


def test_a_pool_that_is_stopped_ends_the_episode() -> None:
    with SlotPool(slots_per_container=1) as pool:
        env = SlotEnv(pool)
        env.reset()
    *_, truncated, info = env.step("true")
    assert truncated
    assert "the pool has been stopped" in info["truncated_by"]
    with pytest.raises(PoolClosed, match="stopped"):
        env.reset()
    env.close()


def test_a_pool_of_its_own_lives_from_reset_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    others, path = set(servers()), os.environ["PATH"]
    env = SlotEnv(SlotPoolConfig(slots_per_container=1, max_containers=1, command_timeout=0.3, isolation="bwrap"))
    with pytest.raises(ResetNeeded, match="has a pool"):
        _ = env.pool
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(IsolationUnavailable):
        env.reset()
    monkeypatch.setenv("PATH", path)  # and now it starts
    for _ in range(2):
        env.reset()
        env.reset()
        assert len(set(servers()) - others) == 1
        assert env.pool.total_slots == 1
        assert env.step("echo on; sleep 1024")[4]["result"].timed_out
        env.close()
        env.close()
        assert set(servers()) == others


def test_actions_of_environments_in_threads_run_at_the_same_time(pool: SlotPool) -> None:
    """Each action waits until the test has seen all of them run, so none can be before another."""
    envs = [SlotEnv(pool) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(SlotEnv.reset, envs))
        steps = [threads.submit(env.step, "mkfifo gate; cat gate") for env in envs]
        for env in envs:
            env.slot.bash("until [ -p gate ]; do sleep 0.01; done", check=True)
        for number, env in enumerate(envs):
            env.slot.bash(f"echo {number} > gate", check=True)
        assert [step.result()[0] for step in steps] == ["0\n", "1\n", "2\n", "3\n"]
        list(threads.map(SlotEnv.close, envs))


def test_more_threads_than_slots_take_turns(pool: SlotPool) -> None:
    def play(number: int) -> str:
        with SlotEnv(pool, max_steps=2) as env:
            for episode in range(3):
                env.reset()
                env.step(f"echo {number}.{episode} >> f")
                observation, _, _, truncated, _ = env.step("cat f")
                assert (observation, truncated) == (f"{number}.{episode}\n", True)
        return observation

    with ThreadPoolExecutor(10) as threads:
        assert list(threads.map(play, range(10))) == [f"{number}.2\n" for number in range(10)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("max_steps", True),
        ("max_steps", 1.5),
        ("max_length", None),
        ("max_action_length", "10"),
        ("max_seconds", 0),
        ("max_seconds", float("nan")),
        ("command_timeout", -1),
        ("command_timeout", 90_000),
        ("command_timeout", "1"),
        ("render_mode", "human"),
    ],
)
def test_a_bad_argument_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: "):
        SlotEnv(SlotPool(), **{name: value})


def test_what_is_no_pool_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^pool: "):
        SlotEnv("http://127.0.0.1:8080")  # type: ignore[arg-type]
