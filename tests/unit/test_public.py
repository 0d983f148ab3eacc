"""What `import slotpool` gives, and what it costs."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slotpool

PACKAGE = str(Path(slotpool.__file__).resolve().parents[1])
NAMES = [
    "AcquireTimeout",
    "CommandFailed",
    "ContainerLost",
    "ExecutionResult",
    "InvalidRequest",
    "LeaseLost",
    "Slot",
    "SlotPool",
    "SlotPoolConfig",
    "SlotPoolError",
    "SlotState",
    "__version__",
]
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "SlotPoolError": ("m",),
    "AcquireTimeout": ("m",),
    "CommandFailed": (slotpool.ExecutionResult(success=False, exit_code=3, stderr="oops"),),
    "ContainerLost": ("m", True),
    "InvalidRequest": ("field", "a string", "5"),
    "LeaseLost": ("m", True),
}


def fresh(code: str, *options: str) -> Any:
    """What ``code`` prints as JSON in an interpreter that has imported nothing yet."""
    env = {**os.environ, "PYTHONPATH": PACKAGE}
    done = subprocess.run([sys.executable, *options, "-c", code], env=env, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_public_names_are_these() -> None:
    assert sorted(slotpool.__all__) == NAMES
    assert set(NAMES) <= set(dir(slotpool))
    assert len(NAMES) <= 12


def test_every_public_name_is_what_its_own_module_defines() -> None:
    for name in NAMES:
        value = getattr(slotpool, name)
        if name == "__version__":
            assert value.count(".") == 2
        else:
            assert value.__name__ == name
            assert value is getattr(importlib.import_module(value.__module__), name)


def test_a_star_import_brings_them_all() -> None:
    assert fresh("import json\nfrom slotpool import *\nprint(json.dumps([SlotPool.__name__, LeaseLost.__name__]))") == [
        "SlotPool",
        "LeaseLost",
    ]


def test_an_unknown_name_is_an_attribute_error_like_in_any_module() -> None:
    with pytest.raises(AttributeError, match="SlotPoll"):
        slotpool.SlotPoll  # noqa: B018
    assert not hasattr(slotpool, "_nothing")


def test_importing_the_package_imports_nothing_big() -> None:
    loaded = fresh("import json, sys, slotpool\nprint(json.dumps(sorted(sys.modules)))")
    assert "slotpool" in loaded
    assert {"requests", "urllib3", "attr", "slotpool.pool", "slotpool.errors"}.isdisjoint(loaded)


def test_a_name_brings_its_own_module_alone() -> None:
    loaded = fresh("import json, sys\nfrom slotpool import SlotPoolConfig\nprint(json.dumps(sorted(sys.modules)))")
    assert "slotpool.config" in loaded
    assert {"requests", "urllib3", "slotpool.pool"}.isdisjoint(loaded)


def test_what_runs_in_slots_needs_the_standard_library_alone() -> None:
    path = f"import json, sys\nsys.path.append({PACKAGE!r})\n"
    loaded = fresh(path + "from slotpool.sandbox import nursery\nprint(json.dumps(sorted(sys.modules)))", "-I", "-S")
    own = {name for name in loaded if name.partition(".")[0] == "slotpool"}
    assert "slotpool.sandbox.nursery" in own
    others = {"attr", "attrs", "requests", "urllib3", "slotpool.sandbox.host", "slotpool.sandbox.app"}
    assert (others | {"typing"}).isdisjoint(loaded)  # of which every zygote would have a copy to give back


def test_no_exception_is_missing_here() -> None:
    public = [name for name in NAMES if isinstance(getattr(slotpool, name), type)]
    assert {name for name in public if issubclass(getattr(slotpool, name), BaseException)} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_public_exception_is_a_slot_pool_error_and_travels(name: str) -> None:
    kind: type[slotpool.SlotPoolError] = getattr(slotpool, name)
    assert issubclass(kind, slotpool.SlotPoolError)
    error = kind(*EXAMPLES[name])
    for arrived in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(arrived) is kind
        assert str(arrived) == str(error)
        assert arrived.args == error.args
        assert vars(arrived) == vars(error)


def test_type_checkers_are_told_that_it_is_typed() -> None:
    assert (Path(slotpool.__file__).parent / "py.typed").exists()
