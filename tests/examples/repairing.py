"""Agents repair programs, many at once: a gymnasium environment with tasks and a reward, played in threads.

    python tests/examples/repairing.py [ENVIRONMENTS]

The agent here knows its tricks by heart. A model's would take the observations as its prompt, and answer with the next action.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slotpool import ExecutionResult, Slot, SlotPool
from slotpool.gym import SlotEnv

# What a program is for, the program, and what it should print. That never gets into a slot, so no agent can read it there.
TASKS: list[tuple[str, str, dict[str, str]]] = [
    ("double(n) is twice n", "def double(n):\n    return n + 2\n", {"double(2)": "4", "double(5)": "10"}),
    ("last(s) is the last of s", "def last(s):\n    return s[0]\n", {"last('ab')": "b", "last('x')": "x"}),
    ("words(s) is how many s has", "def words(s)\n    return len(s)\n", {"words('ab c')": "2", "words('')": "0"}),
]
TRICKS = {
    "n + 2": "sed -i 's/n + 2/2 * n/' program.py",
    "s[0]": "sed -i 's/0/-1/' program.py",
    "def words(s)\n": "sed -i 's/s)$/s):/; s/len(s):/len(s.split())/' program.py",
}

THINKING = 0.05  # seconds that a model would take


class Repairing(SlotEnv):
    """An episode is a program. Its reward is the share of calls that print what they should, and it ends when all do."""

    def set_up(self, slot: Slot, options: Mapping[str, Any]) -> str:
        purpose, program, self.calls = TASKS[int(options.get("task", self.np_random.integers(len(TASKS))))]
        slot.write_file("program.py", program)
        return f"In program.py, {purpose}. Repair it.\n"

    def reward(self, result: ExecutionResult) -> float:
        self.share = sum(self.prints(call) == expected for call, expected in self.calls.items()) / len(self.calls)
        return self.share

    def is_done(self, result: ExecutionResult) -> bool:
        return self.share == 1

    def prints(self, call: str) -> str:
        return self.slot.bash("python3 -B -", stdin=f"from program import *\nprint({call})", timeout=10).stdout.strip()


def act(observation: str) -> str:
    time.sleep(THINKING)
    return next((action for sign, action in TRICKS.items() if sign in observation), "cat program.py")


def play(pool: SlotPool, tasks: list[int]) -> int:
    """How many of these are solved."""
    solved = 0
    with Repairing(pool, max_steps=5) as env:
        for task in tasks:
            observation, _ = env.reset(options={"task": task})
            done = truncated = False
            while not (done or truncated):
                observation, _, done, truncated, _ = env.step(act(observation))
            solved += done
    return solved


def main(count: int) -> None:
    tasks = [number % len(TASKS) for number in range(2 * count)]
    with SlotPool(slots_per_container=2 * count) as pool:
        for environments in (1, count):
            shares = [tasks[first::environments] for first in range(environments)]
            begun = time.perf_counter()
            with ThreadPoolExecutor(environments) as threads:
                solved = sum(threads.map(play, [pool] * environments, shares))
            seconds = time.perf_counter() - begun
            print(f"{environments} at once: {solved} of {len(tasks)} solved in {seconds:.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 8)
