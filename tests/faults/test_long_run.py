"""Thousands of leases leave nothing behind in the processes that serve them; ``long_run.py`` does the same for hours."""

from __future__ import annotations

import long_run
from long_run import Sample

LEASES, USED, PIECES = 800, 8, 8
SLACK = 1500  # kB that the second half may add
SPREAD = 15  # threads, descriptors, sockets or groups more than there were at some time before: those of calls side by side


def test_many_leases_in_one_process_leave_nothing() -> None:
    told: list[dict[str, Sample]] = []
    long_run.run(LEASES, USED, "auto", PIECES, lambda done, samples: told.append(samples))
    for name in told[0]:
        first, second = [[one[name] for one in half] for half in (told[1 : PIECES // 2], told[PIECES // 2 :])]
        assert min(one.kilobytes for one in second) < max(one.kilobytes for one in first) + SLACK, (name, told)
        for kind in ("threads", "descriptors", "sockets", "groups"):
            before, after = [min(getattr(one, kind) for one in half) for half in (first, second)]
            assert after <= before + SPREAD, (name, kind, told)
