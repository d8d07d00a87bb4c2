"""How many threads share a step on the CPU: fewer while others want the processors.

The threads of an operator meet at its end, hundreds of times a step. If one of them waits for a processor, all wait:
beside a busy process on two cores, a step on two threads takes three times as long as alone, on one thread not twice.

How long a step's thread was kept off its processor tells when it is crowded. Whether there is room again nobody tells
who does not try: after a while, and after each trial in vain twice as long, two steps run on one thread more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

CROWDED = 0.25
"""Share of its time that a step was kept waiting, smoothed, from which on a thread is left out."""
ROOMY = 0.1
"""Share up to which a thread more may stay."""
SHORTEST = 0.003
"""Seconds; a shorter step tells nothing."""
TRIAL_STEPS = 2
FIRST_REST, LONGEST_REST = 1.0, 30.0
"""Seconds until one thread more is tried."""

Clock = Callable[[], float]


class Crowding:
    """Sets the number of threads of the thread that steps, which alone uses this."""

    def __init__(
        self,
        *,
        clock: Clock = time.perf_counter,
        processor_clock: Clock = time.thread_time,
        set_threads: Callable[[int], object] = torch.set_num_threads,
        usual: Callable[[], int] = torch.get_num_threads,
    ) -> None:
        self._clock = clock
        self._processor_clock = processor_clock
        self._set_threads = set_threads
        self._get_usual = usual
        self._usual = 0  # not known before the thread that steps asks
        self._num = 0
        self._waited = 0.0
        self._trial: list[float] | None = None  # shares of the trial's steps so far
        self._rest = FIRST_REST
        self._next_trial = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a step."""
        if not self._usual:
            self._usual = self._num = self._get_usual()
        if self._usual == 1:
            yield
            return
        began, began_on_processor = self._clock(), self._processor_clock()
        yield
        now = self._clock()
        if now - began >= SHORTEST:
            self._learn(1 - (self._processor_clock() - began_on_processor) / (now - began), now)

    def _learn(self, share: float, now: float) -> None:
        if self._trial is not None:
            self._trial.append(share)
            if len(self._trial) == TRIAL_STEPS:
                self._end_trial(sum(self._trial) / TRIAL_STEPS, now)
            return
        self._waited = (self._waited + share) / 2
        if self._waited > CROWDED and self._num > 1:
            self._change(self._num - 1, now)
        elif self._num < self._usual and now >= self._next_trial:
            self._change(self._num + 1, now)
            self._trial = []

    def _end_trial(self, share: float, now: float) -> None:
        self._trial = None
        if share <= ROOMY:
            self._rest = FIRST_REST
            self._next_trial = now
        else:
            self._rest = min(2 * self._rest, LONGEST_REST)
            self._change(self._num - 1, now)

    def _change(self, num: int, now: float) -> None:
        self._num = num
        self._set_threads(num)
        self._waited = 0.0
        self._next_trial = now + self._rest
