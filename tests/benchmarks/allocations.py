"""What following many allocations costs a pool, on the fake of Nomad: ``python allocations.py [ALLOCATIONS ...]``.

A pool in a process of its own: its memory and threads when all have been admitted, and after 100 were lost and replaced.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fake_nomad import FakeNomad

from slotpool import SlotPool

CHANGES = 100


def look(count: int) -> None:
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    figures = {"rss": int(told["VmRSS"].split()[0]), "threads": int(told["Threads"]), "containers": count}
    print(json.dumps(figures), flush=True)


def follow(settings: dict[str, Any]) -> None:
    look(0)
    begun = time.monotonic()
    with SlotPool(**settings) as pool:
        print(f"{time.monotonic() - begun:.2f}", flush=True)
        for _ in sys.stdin:
            look(pool.get_stats()["containers"])


def measure(count: int) -> None:
    with FakeNomad(nodes=1) as fake:
        settings: dict[str, Any] = {
            "driver": "raw_exec",
            "slots_per_container": 10,
            "max_containers": count,
            "update_job": False,
        }
        fake.populate("job", count, **settings)
        settings |= {"nomad_address": fake.address, "job_id": "job", "min_containers": count, "health_check_interval": 30.0}
        settings |= {"lease_ttl": 3600.0}
        command = [sys.executable, __file__, "follow", json.dumps(settings)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None
        assert child.stdout is not None

        def ask() -> dict[str, Any]:
            print(file=child.stdin, flush=True)
            return dict(json.loads(child.stdout.readline()))  # type: ignore[union-attr]

        bare = json.loads(child.stdout.readline())
        took = child.stdout.readline().strip()
        first = ask()
        for i in range(CHANGES):
            running = [one for one in fake.allocations("job") if one["ClientStatus"] == "running"]
            fake.lose(running[i % len(running)]["ID"])
            time.sleep(0.05)
        time.sleep(2.0)
        last = ask()
        child.stdin.close()
        child.wait()
    grown, later = (first["rss"] - bare["rss"]) / 1024, (last["rss"] - first["rss"]) / 1024
    print(f"{count} allocations: admitted in {took} s; {grown:.1f} MB more than before, {first['threads']} threads")
    print(f"  {CHANGES} replaced: {later:+.1f} MB, {last['threads']} threads, {last['containers']} containers")


if __name__ == "__main__":
    if sys.argv[1:2] == ["follow"]:
        follow(json.loads(sys.argv[2]))
    else:
        for number in sys.argv[1:] or ["10", "100", "1000"]:
            measure(int(number))
