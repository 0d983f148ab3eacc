"""A gymnasium environment whose actions are bash commands in a slot: :class:`SlotEnv`, to be subclassed with a task."""

from __future__ import annotations

import string
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsFloat

try:
    import gymnasium
except ImportError as e:
    raise ImportError(f"slotpool.gym needs gymnasium ({e}): pip install 'slotpool[gym]'", name=e.name) from e
from gymnasium.error import InvalidAction, ResetNeeded

from .errors import ContainerLost, ContainerRefused, InvalidRequest, LeaseLost, SetupFailed, SlotBroken, SlotPoolError, shown
from .pool import SlotPool
from .slot import ExecutionResult

if TYPE_CHECKING:
    import numpy as np

    from .preparing import Steps
    from .slot import Slot

_TRIES = 3  # slots that one reset takes, when they are lost amid the set-up
_LOST = (ContainerLost, LeaseLost, ContainerRefused)


class AnyText(gymnasium.spaces.Text):
    """Every ``str`` of at most ``max_length`` characters. It samples from printable ASCII, without line breaks.

    It can't be flattened to numbers, as ``Text`` can: that needs a list of all characters.

    :param max_length: characters.
    :param seed: for sampling.
    """

    def __init__(self, max_length: int, *, seed: int | np.random.Generator | None = None) -> None:
        characters = string.ascii_letters + string.digits + string.punctuation + " "
        super().__init__(max_length, min_length=0, charset=characters, seed=seed)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __eq__(self, other: object, /) -> bool:
        return isinstance(other, AnyText) and self.max_length == other.max_length

    def __repr__(self) -> str:
        return f"AnyText({self.max_length})"


class SlotEnv(gymnasium.Env[str, str]):
    """Episodes in slots of a pool: each begins in a clean one, and each step runs its action as a bash command there.

    Works as it is, with reward 0; for a task, override :meth:`set_up`, :meth:`observe`, :meth:`reward` and :meth:`is_done`.

    Not thread-safe: one thread at a time. The pool is, so any number of environments may run in threads of their own on one
    pool. In another process (``AsyncVectorEnv``) the environment needs a pool that was made there.

    :param pool: a started pool. Closing the environment does not stop it.
    :param setup: as for :meth:`.SlotPool.acquire`, carried out in each clean slot before :meth:`set_up`. Default none.
    :param network: as for :meth:`.SlotPool.acquire`.
    :param acquire_timeout: seconds that ``reset`` waits for a slot; default the pool's ``acquire_timeout``.
    :param command_timeout: seconds for each action; default the pool's ``command_timeout``. An action that takes longer is
        killed, and its result has ``timed_out``; the episode goes on.
    :param max_steps: steps after which an episode is truncated; default never.
    :param max_seconds: seconds after which an episode is truncated, counted from the end of ``reset``, whoever spends them;
        default never. An action that is still running then is killed, and one that comes later is not run: both have a
        result with ``timed_out``.
    :param max_length: characters of an observation. Of a longer one, head and tail are kept, with a line between them that
        says how much was left out.
    :param max_action_length: characters of an action.
    :raises InvalidRequest: an argument can't be used.
    """

    observation_space: AnyText
    action_space: AnyText

    def __init__(
        self,
        pool: SlotPool,
        *,
        setup: Steps | None = None,
        network: bool | None = None,
        acquire_timeout: float | None = None,
        command_timeout: float | None = None,
        max_steps: int | None = None,
        max_seconds: float | None = None,
        max_length: int = 100_000,
        max_action_length: int = 100_000,
    ) -> None:
        if not isinstance(pool, SlotPool):
            raise InvalidRequest("pool", "a SlotPool", shown(pool))
        for name, limit in {"max_steps": max_steps, "max_length": max_length, "max_action_length": max_action_length}.items():
            if (limit is None and name != "max_steps") or not _is_positive(limit, int):
                raise InvalidRequest(name, "an integer, at least 1", shown(limit))
        if not _is_positive(max_seconds, (int, float)):
            raise InvalidRequest("max_seconds", "a number of seconds above 0, or None", shown(max_seconds))
        self.observation_space = AnyText(max_length)
        self.action_space = AnyText(max_action_length)
        self.pool = pool
        self._wanted = {"setup": setup, "network": network, "timeout": acquire_timeout}
        self._command_timeout = pool._timeout(command_timeout)
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._max_length = max_length
        self._slot: Slot | None = None
        self._steps = 0
        self._deadline = float("inf")  # on the monotonic clock
        self._ended = "the environment is new"  # why a step can't be taken; empty amid an episode

    # What a task overrides

    def set_up(self, slot: Slot, options: Mapping[str, Any]) -> str | None:
        """Prepare a clean slot for an episode; :attr:`np_random` is seeded.

        If the slot is lost amid it, it is called again with another one, and :attr:`np_random` as it was before.

        :param options: what ``reset`` was given, empty if nothing.
        :returns: the first observation, such as what is to be done; None, the default, for an empty one.
        """
        return None

    def observe(self, result: ExecutionResult) -> str:
        """What is to be seen of a step; called first after each. By default what the command printed, standard error last,
        and a line that says how it ended, if it did not succeed.
        """
        if result.success:
            return result.output
        how = result.error or ("timed out" if result.timed_out else f"exit code {result.exit_code}")
        gap = "\n" if result.output and not result.output.endswith("\n") else ""
        return f"{result.output}{gap}[{how}]\n"

    def reward(self, result: ExecutionResult) -> SupportsFloat:
        """What a step is worth; called after :meth:`observe`. It may run commands in :attr:`slot`. By default 0."""
        return 0.0

    def is_done(self, result: ExecutionResult) -> bool:
        """Whether the step has ended the episode, so that it terminates; called after :meth:`reward`. By default never."""
        return False

    # What gymnasium calls

    @property
    def slot(self) -> Slot:
        """The slot of the episode. It stays as it is after the episode's end, unless it was lost, until the next ``reset``.

        :raises gymnasium.error.ResetNeeded: there is none.
        """
        if self._slot is None:
            raise ResetNeeded("expected an environment that has a slot, got one without; call reset() first")
        return self._slot

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode in a clean slot: the one that is held, or a new one if there is none or it was lost.

        Safe to call again if it fails. After :meth:`close` it begins anew.

        :param seed: for :attr:`np_random`; by default that goes on.
        :param options: handed to :meth:`set_up`.
        :returns: the first observation, and the info: ``steps``, which is 0.
        :raises AcquireTimeout, PoolClosed, SetupFailed: as :meth:`.SlotPool.acquire`.
        :raises ContainerLost, LeaseLost, ContainerRefused: one slot after the other was lost amid the set-up.
        """
        super().reset(seed=seed)
        self._ended = "its reset() has failed"
        random_state = self.np_random.bit_generator.state
        for tries_left in reversed(range(_TRIES)):
            try:
                slot = self._clean_slot()
                first = self.set_up(slot, options or {})
                break
            except SlotPoolError as e:
                lost = isinstance(e, _LOST) or (isinstance(e, SetupFailed) and isinstance(e.__cause__, _LOST))
                if lost:
                    self._give_back()
                if not lost or not tries_left:
                    raise
                self.np_random.bit_generator.state = random_state
        self._steps = 0
        self._deadline = time.monotonic() + (self._max_seconds or float("inf"))
        self._ended = ""
        return self._text("set_up", "" if first is None else first), {"steps": 0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Run a bash command in the slot; see :meth:`.Slot.bash`. What it does never raises, a command that is killed, that
        breaks its slot's processes or that can't be run at all included: that is in its result.

        If the slot is lost, the episode is truncated: the observation says why, the reward is 0, the task is not asked.

        :returns: observation, reward, terminated, truncated and info: ``result``, the whole :class:`.ExecutionResult`;
            ``steps``, of the episode so far; ``truncated_by`` if truncated: ``max_steps``, ``max_seconds``, or the class and
            the message of the error by which the slot was lost.
        :raises gymnasium.error.ResetNeeded: there is no episode, or it has ended.
        :raises gymnasium.error.InvalidAction: it is no ``str``, or too long; nothing was run.
        """
        if self._ended:
            raise ResetNeeded(f"expected an episode under way, but {self._ended}; call reset() first")
        if action not in self.action_space:
            raise InvalidAction(f"expected a str of at most {self.action_space.max_length} characters, got {shown(action)}")
        slot = self.slot
        self._steps += 1
        info: dict[str, Any] = {"steps": self._steps}
        try:
            info["result"] = result = self._run(slot, action)
            is_late = time.monotonic() >= self._deadline
            observation = self._text("observe", self.observe(result))
            reward, terminated = float(self.reward(result)), bool(self.is_done(result))
        except _LOST as e:
            self._give_back()
            info.setdefault("result", ExecutionResult.failed(e, "", slot.slot_id))
            info["truncated_by"] = f"{type(e).__name__}: {e}"
            self._ended = f"the last one was truncated: {info['truncated_by']}"
            return self._text("observe", f"[{e}]\n"), 0.0, False, True, info
        if terminated:
            self._ended = "the last one has terminated"
        elif is_late or self._steps == self._max_steps:
            info["truncated_by"] = "max_seconds" if is_late else "max_steps"
            self._ended = f"the last one was truncated by {info['truncated_by']}"
        return observation, reward, terminated, "truncated_by" in info, info

    def close(self) -> None:
        """Give the slot back. Repeatable."""
        self._ended = "the environment is closed"
        self._give_back()

    # Inside

    def _clean_slot(self) -> Slot:
        if self._slot is None:
            self._slot = self.pool.acquire(**self._wanted)  # type: ignore[arg-type]
        else:
            self._slot.reset()
        return self._slot

    def _give_back(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()

    def _run(self, slot: Slot, action: str) -> ExecutionResult:
        left = self._deadline - time.monotonic()
        if left < 0.001:  # the shortest time that a command can be given
            return ExecutionResult(success=False, timed_out=True, error="not run: the episode's time is up")
        try:
            return slot.bash(action, timeout=min(self._command_timeout, left))
        except (SlotBroken, InvalidRequest) as e:  # the action's own doing; the slot stands
            return ExecutionResult.failed(e, "", slot.slot_id)

    def _text(self, hook: str, text: object) -> str:
        if not isinstance(text, str):
            raise TypeError(f"{type(self).__name__}.{hook}: expected an observation as str, got {shown(text)}")
        return _shortened(text, self._max_length)


def _is_positive(value: object, kind: type | tuple[type, ...]) -> bool:
    return value is None or (isinstance(value, kind) and not isinstance(value, bool) and value > 0)  # type: ignore[operator]


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    keep = limit - len(f"\n[... {len(text)} characters left out ...]\n")
    if keep <= 0:
        return text[:limit]
    tail = keep // 2
    return f"{text[: keep - tail]}\n[... {len(text) - keep} characters left out ...]\n{text[len(text) - tail :]}"
