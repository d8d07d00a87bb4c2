"""OpenMP's threads: how long they wait between operators, and whose are there to wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dendrite.engine import openmp

TEAM = """
import os, time
{first}
import torch
from dendrite.engine.openmp import dismiss_team

def num_threads(expected):
    end = time.monotonic() + 10
    while len(os.listdir("/proc/self/task")) != expected and time.monotonic() < end:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
alone = num_threads(1)
torch.ones(1 << 20).exp()
print(num_threads(alone + 1) - alone)
dismiss_team()
print(num_threads({left}) - alone)
torch.ones(1 << 20).exp()
print(num_threads(alone + 1) - alone)
"""


def output_of(script: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=clean | environment,
    )
    return done.stdout + done.stderr


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GCC's OpenMP along on Linux only")


def test_threads_wait_awake_for_a_bounded_time() -> None:
    """PyTorch's OpenMP starts with our count, once, and the environment shows nothing of it."""
    script = "import dendrite, torch, os\nprint('left', os.environ.get('GOMP_SPINCOUNT'))"
    shown = output_of(script, OMP_DISPLAY_ENV="verbose")
    assert shown.count("GOMP_SPINCOUNT = ") == 1
    assert f"GOMP_SPINCOUNT = '{openmp.SPIN_COUNT}'" in shown
    assert "left None" in shown


def test_the_user_decides_first() -> None:
    """A count that the environment names already stays."""
    shown = output_of("import dendrite, torch", OMP_DISPLAY_ENV="verbose", GOMP_SPINCOUNT="123")
    assert "GOMP_SPINCOUNT = '123'" in shown


def test_a_dismissed_team_ends_and_comes_back() -> None:
    """A thread's workers are gone after it dismissed them, and there again when it computes."""
    assert output_of(TEAM.format(first="import dendrite", left="alone")).split() == ["1", "0", "1"]


def test_without_a_bound_the_team_stays() -> None:
    """Where PyTorch came first and its threads would spin for milliseconds, nobody is dismissed."""
    assert output_of(TEAM.format(first="", left="alone + 1")).split() == ["1", "1", "1"]
