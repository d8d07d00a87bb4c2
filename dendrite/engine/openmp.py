"""How long an operator's threads wait for the next one: long enough to meet it, not long enough to be in the way.

A step on the CPU is hundreds of operators, a few microseconds apart, that two or more threads share. GCC's OpenMP,
which PyTorch's wheels for Linux bring along, has two ways to wait, and neither suits a step:

    threads <= processors    awake for milliseconds. Where another program needs a processor too, the thread that has
                             work waits for one that spins: beside a busy process a step took ten times as long.
    threads >  processors    asleep at once. Waking up takes longer than most operators: a step took 1.6 times as long.

It counts the threads of all teams, and every thread that ever ran an operator keeps a team, so the one that loads a
model makes the step loop's one too many. Here both are put right, without a setting that would outlive the import.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

SPIN_COUNT = 5_000
"""Turns of an empty loop that a thread waits awake, a tenth of a millisecond: gaps between operators are shorter."""

_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_PAUSE_SOFT = 1  # omp_pause_soft in omp.h: give back threads, keep settings


def _bound_spinning() -> bool:
    """Load PyTorch's OpenMP with `SPIN_COUNT`, which it reads only then; the environment is as before afterwards.

    Returns:
        Whether waits are bounded now, by this or by settings of the user's. They are not where PyTorch was loaded
        before, or brings no such library along.
    """
    if any(name in os.environ for name in _SETTINGS):
        return True
    if sys.platform != "linux" or "torch" in sys.modules:
        return False
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    libraries = list(Path(found.origin).parent.glob("lib/libgomp*.so*"))
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    try:
        for library in libraries:
            ctypes.CDLL(str(library))
    finally:
        del os.environ["GOMP_SPINCOUNT"]
    return bool(libraries)


_IS_BOUNDED = _bound_spinning()


def dismiss_team() -> None:
    """End the calling thread's own workers, if it has any; its next parallel operator gets new ones.

    Where waits are not bounded the workers stay: being too many is what keeps the others from spinning.
    """
    if _IS_BOUNDED and (pause := _pause()) is not None:
        pause(_PAUSE_SOFT)


@cache
def _pause() -> Callable[[int], int] | None:
    """OpenMP's own function, if it is loaded; looked up once, since that takes longer than all the rest of a call."""
    return getattr(ctypes.CDLL(None), "omp_pause_resource_all", None) if sys.platform == "linux" else None
