"""What gym-style environments cost: plain subprocesses, one SlotEnv, many in turn and many in threads.

    python tests/benchmarks/environments.py [ENVIRONMENTS]

An episode is a reset and five steps. A command that waits (for a network, a disk, a test's own sleep) leaves its processor to
others; one that computes needs a processor of its own to be any faster beside others.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gymnasium.vector import SyncVectorEnv

from slotpool import SlotPool
from slotpool.gym import SlotEnv

STEPS = 5
EPISODES = 5  # of each environment
COMMANDS = {"true": "nothing", "sleep 0.1": "waits", "/usr/bin/python3 -c 'sum(range(3000000))'": "computes"}


def plain(command: str) -> None:
    for _ in range(EPISODES):
        with tempfile.TemporaryDirectory() as directory:
            for _ in range(STEPS):
                subprocess.run(["bash", "-c", command], cwd=directory, capture_output=True, text=True, check=True)


def alone(env: SlotEnv, command: str) -> None:
    for _ in range(EPISODES):
        env.reset()
        for _ in range(STEPS):
            env.step(command)


def in_turn(envs: list[SlotEnv], command: str) -> None:
    vector = SyncVectorEnv([functools.partial(_same, env) for env in envs])
    for _ in range(EPISODES):
        vector.reset()
        for _ in range(STEPS):
            vector.step([command] * len(envs))


def _same(env: SlotEnv) -> SlotEnv:
    return env


def in_threads(envs: list[SlotEnv], command: str) -> None:
    with ThreadPoolExecutor(len(envs)) as threads:
        list(threads.map(functools.partial(alone, command=command), envs))


def rate(environments: int, act: Callable[..., None], *args: Any) -> float:
    begun = time.perf_counter()
    act(*args)
    return environments * EPISODES * STEPS / (time.perf_counter() - begun)


def main(count: int) -> None:
    with SlotPool(slots_per_container=2 * count, max_containers=1) as pool:
        envs = [SlotEnv(pool) for _ in range(count)]
        in_threads(envs, "true")
        print(f"{'steps a second':55} {'plain':>8} {'1 env':>8} {f'{count} in turn':>12} {f'{count} in threads':>12}")
        for command, what in COMMANDS.items():
            one = rate(1, plain, command), rate(1, alone, envs[0], command)
            many = rate(count, in_turn, envs, command), rate(count, in_threads, envs, command)
            print(f"{what + ': ' + command:55} {one[0]:8.0f} {one[1]:8.0f} {many[0]:12.0f} {many[1]:12.0f}")
        for env in envs:
            env.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 8)
