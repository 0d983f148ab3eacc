"""A gymnasium environment whose actions are bash commands in a slot: :class:`SlotEnv`, to be subclassed with a task."""

from __future__ import annotations

import logging
import string
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, SupportsFloat

try:
    import gymnasium
except ImportError as e:
    raise ImportError(f"slotpool.gym needs gymnasium ({e}): pip install 'slotpool[gym]'", name=e.name) from e
from gymnasium.error import CustomSpaceError, InvalidAction, ResetNeeded

from .config import SlotPoolConfig
from .errors import InvalidRequest, SlotBroken, SlotError, SlotPoolError, shown
from .pool import SlotPool
from .preparing import cause_of
from .slot import ExecutionResult

if TYPE_CHECKING:
    import numpy as np

    from .preparing import Steps
    from .slot import Slot

log = logging.getLogger(__name__)

_TRIES = 3  # slots that one reset takes, when they are lost amid the set-up


class AnyText(gymnasium.spaces.Text):
    """Every ``str`` of at most ``max_length`` characters. It samples from printable ASCII, without line breaks.

    It can't be flattened to numbers, as ``Text`` can: that needs a list of all characters. So ``AsyncVectorEnv`` needs
    ``shared_memory=False``.

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


@gymnasium.vector.utils.create_shared_memory.register(AnyText)
@gymnasium.spaces.utils.flatten_space.register(AnyText)
def _refuse_numbers(space: AnyText, *_: Any, **__: Any) -> NoReturn:
    # What is there for Text fails with the first character that is not in its list, a line break say.
    raise CustomSpaceError(f"{space} can't be made numbers of; AsyncVectorEnv takes it with shared_memory=False")


class SlotEnv(gymnasium.Env[str, str]):
    """Episodes in slots of a pool: each begins in a clean one, and each step runs its action as a bash command there.

    Works as it is, with reward 0; for a task, override :meth:`set_up`, :meth:`observe`, :meth:`reward` and :meth:`is_done`.

    Not thread-safe: one thread at a time. The pool is, so any number of environments may run in threads of their own on one
    pool. A pool can't be used in another process, so what is made there (``AsyncVectorEnv``) takes the settings of one.

    :param pool: a started pool, which closing the environment does not stop; or the settings of a pool of its own, which
        ``reset`` starts and ``close`` stops.
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
    :param render_mode: ``"ansi"`` makes :meth:`render` give text.
    :raises InvalidRequest: an argument can't be used; of what the pool's ``acquire`` is given, :meth:`reset` finds that out.
    """

    # The second is asked for wherever something can be rendered, though text has none.
    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  # an instance's, says the base class

    observation_space: AnyText
    action_space: AnyText

    def __init__(
        self,
        pool: SlotPool | SlotPoolConfig,
        *,
        setup: Steps | None = None,
        network: bool | None = None,
        acquire_timeout: float | None = None,
        command_timeout: float | None = None,
        max_steps: int | None = None,
        max_seconds: float | None = None,
        max_length: int = 100_000,
        max_action_length: int = 100_000,
        render_mode: str | None = None,
    ) -> None:
        if not isinstance(pool, (SlotPool, SlotPoolConfig)):
            raise InvalidRequest("pool", "a SlotPool or a SlotPoolConfig", shown(pool))
        _check_count("max_steps", 1 if max_steps is None else max_steps)
        _check_count("max_length", max_length)
        _check_count("max_action_length", max_action_length)
        _check_seconds("command_timeout", command_timeout, 86_400)
        _check_seconds("max_seconds", max_seconds, float("inf"))
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InvalidRequest("render_mode", f"None or one of {self.metadata['render_modes']}", shown(render_mode))
        self.observation_space = AnyText(max_length)
        self.action_space = AnyText(max_action_length)
        self.render_mode = render_mode
        self._pool = pool if isinstance(pool, SlotPool) else None
        self._own = pool if isinstance(pool, SlotPoolConfig) else None  # the settings of the environment's own pool
        self._wanted: dict[str, Any] = {"setup": setup, "network": network, "timeout": acquire_timeout}
        config = pool.config if isinstance(pool, SlotPool) else pool
        self._command_timeout = config.command_timeout if command_timeout is None else command_timeout
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._max_length = max_length
        self._slot: Slot | None = None
        self._steps = 0
        self._deadline = float("inf")  # on the monotonic clock
        self._ended = "the environment is new"  # why a step can't be taken; empty amid an episode
        self._frame = ""

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
    def pool(self) -> SlotPool:
        """The pool that slots are taken from.

        :raises gymnasium.error.ResetNeeded: it is the environment's own, and not there.
        """
        if self._pool is None:
            raise ResetNeeded("expected an environment that has a pool, got one without; call reset() first")
        return self._pool

    @property
    def slot(self) -> Slot:
        """The slot of the episode. It stays as it is after the episode's end, unless it was lost, until the next ``reset``.

        :raises gymnasium.error.ResetNeeded: there is none.
        """
        if self._slot is None:
            raise ResetNeeded("expected an environment that has a slot, got one without; call reset() first")
        return self._slot

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Give the slot back, if there is one, and begin an episode in a clean one.

        Safe to call again if it fails. After :meth:`close` it begins anew.

        :param seed: for :attr:`np_random`; by default that goes on.
        :param options: handed to :meth:`set_up`.
        :returns: the first observation, and the info: ``steps``, which is 0.
        :raises AcquireTimeout, PoolClosed, SetupFailed: as :meth:`.SlotPool.acquire`.
        :raises StartFailed, NomadError: as :meth:`.SlotPool.start`, if the pool is the environment's own.
        :raises SlotError: one slot after the other was lost amid the set-up.
        """
        super().reset(seed=seed)
        self._ended = "its reset() has failed"
        if self._own is not None and self._pool is None:
            self._pool = SlotPool(self._own).start()
        random_state = self.np_random.bit_generator.state
        for tries_left in reversed(range(_TRIES)):
            self._give_back()
            try:
                self._slot = self.pool.acquire(**self._wanted)
                first = self.set_up(self._slot, options or {})
                break
            except SlotPoolError as e:
                is_loss = isinstance(cause_of(e), SlotError)
                if not is_loss or not tries_left:
                    raise
                log.warning("a slot was lost amid its set-up, which is begun anew in another: %s", e)
                self.np_random.bit_generator.state = random_state
        self._steps = 0
        self._deadline = time.monotonic() + (self._max_seconds or float("inf"))
        self._ended = ""
        self._frame = self._text("set_up", "" if first is None else first)
        return self._frame, {"steps": 0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Run a bash command in the slot; see :meth:`.Slot.bash`. What it does never raises, a command that is killed, that
        breaks its slot's processes or that can't be run at all included: that is in its result.

        If the slot is lost, or the task's own calls into it fail with a :class:`.SlotError`, the episode is truncated: the
        observation says why, the reward is 0, the slot is given back.

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
            if not terminated and (is_late or self._steps == self._max_steps):
                info["truncated_by"] = "max_seconds" if is_late else "max_steps"
        except SlotError as e:
            self._give_back()
            info.setdefault("result", ExecutionResult.failed(e, "", slot.slot_id))
            info["truncated_by"] = f"{type(e).__name__}: {e}"
            observation, reward, terminated = self._text("observe", f"[{e}]\n"), 0.0, False
        truncated = "truncated_by" in info
        if terminated:
            self._ended = "the last one has terminated"
        elif truncated:
            self._ended = f"the last one was truncated by {info['truncated_by']}"
        self._frame = f"$ {action}\n{observation}"
        return observation, reward, terminated, truncated, info

    def render(self) -> str | None:
        """The last action, as at a prompt, and what was observed of it; after :meth:`reset` what was first observed.

        None without ``render_mode``.
        """
        return None if self.render_mode is None else self._frame

    def close(self) -> None:
        """Give the slot back, and stop the pool if it is the environment's own. Repeatable."""
        self._ended = "the environment is closed"
        self._give_back()
        if self._own is not None and self._pool is not None:
            self._pool.stop()
            self._pool = None

    # Inside

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


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(name, "an integer, at least 1", shown(value))


def _check_seconds(name: str, value: object, most: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.001 <= value <= most:
        raise InvalidRequest(name, f"a number of seconds from 0.001 to {most:g}, or None", shown(value))


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    keep = limit - len(f"\n[... {len(text)} characters left out ...]\n")
    if keep <= 0:
        return text[:limit]
    tail = keep // 2
    return f"{text[: keep - tail]}\n[... {len(text) - keep} characters left out ...]\n{text[len(text) - tail :]}"
