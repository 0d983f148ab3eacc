"""Faults at random, and the proof that nobody was wronged.

    FAULTS_SEED=17 FAULTS_SECONDS=120 FAULTS_RATE=4 pytest tests/faults/test_random_faults.py

repeats the faults of a seed, as far as clocks and scheduling let it, or goes on for longer than usual.
"""

from __future__ import annotations

import os
import random

import pytest
from conftest import ROOT
from run import run

SECONDS = float(os.environ.get("FAULTS_SECONDS", "10"))
RATE = float(os.environ.get("FAULTS_RATE", "4"))  # a second
MODES = os.environ.get("FAULTS_MODES", "bwrap user" if ROOT else "bwrap bwrap").split()


@pytest.mark.timeout(SECONDS + 180)
def test_faults_at_random(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(1_000_000)))
    with capsys.disabled():
        print(f"\nfaults at random: FAULTS_SEED={seed} FAULTS_SECONDS={SECONDS:g} FAULTS_RATE={RATE:g} {' '.join(MODES)}")
    report = run(seed, SECONDS, RATE, MODES)
    with capsys.disabled():
        print(report.figures())
    print(report.said)
    assert report.wrong == []
    assert report.events["result"] > SECONDS
    assert report.events["effect"] > report.events["result"] / 2
