"""Keeps other Python threads from slowing a step.

Every PyTorch call gives the interpreter's lock up and takes it back. With another thread busy in Python, taking it back
means waiting for one switch interval, 5 ms by default, and a step on the CPU makes over a hundred calls, one of which
runs all layers (`compiled`). While it steps, the engine therefore asks for a short interval; and as its thread waits
out that interval on a timer, the timers of that thread are made exact on Linux, where they are otherwise free to ring
50 microseconds late.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_INTERVAL = 5e-5
"""Seconds that a thread may keep the lock while another waits for it. At 5 microseconds, less than a switch of threads
takes, they interrupt each other without getting anywhere: steps took a hundred times as long on a busy machine."""
TIMER_SLACK = 1_000
"""Nanoseconds by which a timer of the engine's thread may ring late."""

_PR_SET_TIMERSLACK = 29  # from Linux' prctl.h


@contextmanager
def stepping() -> Iterator[None]:
    """Run the block with short waits for the interpreter's lock; restores what was set before."""
    _INTERVAL.shorten()
    try:
        yield
    finally:
        _INTERVAL.restore()


def exact_timers() -> None:
    """Make the calling thread's timers exact, for as long as it lives: a thread that waits for work sets none."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(TIMER_SLACK), 0, 0, 0)


class _SwitchInterval:
    """The interpreter's switch interval, shortened while anyone needs it.

    The interval belongs to the process, so engines that step at the same time have to share the one count of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._usual = sys.getswitchinterval()

    def shorten(self) -> None:
        with self._lock:
            if self._num_users == 0:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(min(self._usual, SWITCH_INTERVAL))
            self._num_users += 1

    def restore(self) -> None:
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0:
                sys.setswitchinterval(self._usual)


_INTERVAL = _SwitchInterval()
