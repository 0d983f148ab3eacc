"""What a pool counts. The names follow psycopg_pool's where they mean the same."""

from __future__ import annotations

import attr


@attr.s(slots=True, auto_attribs=True)
class Counters:
    """Since the pool was made; the pool's lock guards them. Each is explained in the README's table of statistics."""

    requests_num: int = 0
    requests_queued: int = 0
    requests_wait_ms: float = 0.0
    requests_errors: int = 0
    usage_ms: float = 0.0
    returns_bad: int = 0
    executions_num: int = 0
    executions_errors: int = 0
    leases_num: int = 0
    leases_lost: int = 0
    slots_abandoned: int = 0
    containers_lost: int = 0
    scale_ups: int = 0
    scale_downs: int = 0
    scale_errors: int = 0

    def as_dict(self) -> dict[str, float]:
        """Times as whole milliseconds."""
        return {name: round(value) for name, value in attr.asdict(self).items()}
