"""A step's threads: one is left out where others want the processors, and comes back when they are gone."""

from __future__ import annotations

import pytest

from dendrite.engine.crowding import LONGEST_REST, SHORTEST, Crowding


class Machine:
    """A clock, and processors that `others` want too: with more threads than there are left, a step waits."""

    def __init__(self, *, processors: int) -> None:
        self.processors = self.threads = processors
        self.others = 0
        self.now = self.on_processor = 0.0
        self.changes: list[int] = []
        self.crowding = Crowding(
            clock=lambda: self.now,
            processor_clock=lambda: self.on_processor,
            set_threads=self._set,
            usual=lambda: self.processors,
        )

    def _set(self, num: int) -> None:
        self.threads = num
        self.changes.append(num)

    def run(self, *, seconds: float, step: float = 0.1) -> None:
        """Steps of this length on the clock."""
        end = self.now + seconds
        while self.now < end:
            with self.crowding.watching():
                self.now += step
                is_kept_waiting = self.threads > max(1, self.processors - self.others)
                self.on_processor += step * (0.5 if is_kept_waiting else 0.98)


def test_a_machine_of_its_own_keeps_all_threads() -> None:
    """Nothing is changed where nobody else is."""
    machine = Machine(processors=4)
    machine.run(seconds=100)
    assert machine.changes == []


@pytest.mark.parametrize("processors, others", [(2, 1), (8, 3), (2, 5)])
def test_others_get_their_processors_and_give_them_back(processors: int, others: int) -> None:
    """As many threads as there is room for, one at least; all of them soon after the others have gone."""
    machine = Machine(processors=processors)
    machine.others = others
    machine.run(seconds=5)
    assert machine.threads == max(1, processors - others)
    machine.others = 0
    machine.run(seconds=20)
    assert machine.threads == processors


def test_trials_in_vain_become_rare() -> None:
    """While it stays crowded, more threads are tried less and less often, but never not at all."""
    machine = Machine(processors=2)
    machine.others = 1
    machine.run(seconds=120)
    early = len(machine.changes)
    machine.run(seconds=120)
    assert 2 <= len(machine.changes) - early <= 2 * (120 / LONGEST_REST) < early


def test_short_steps_tell_nothing() -> None:
    """What a tiny model's step waits for is not worth a change."""
    machine = Machine(processors=2)
    machine.others = 1
    machine.run(seconds=1, step=SHORTEST / 2)
    assert machine.changes == []


def test_one_thread_is_never_watched() -> None:
    """There is none to leave out."""
    machine = Machine(processors=1)
    machine.others = 3
    machine.run(seconds=5)
    assert machine.changes == []
