"""Rivals take turns, so that a machine that speeds up or slows down does so for all of them.

A B C   A B C   A B C
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Samples = dict[str, list[float]]
"""What was measured -> one sample a round."""
Progress = Callable[[str], None]
Run = Callable[[], Mapping[str, float]]
"""One repetition: what was measured -> its value."""


def take_turns(
    rivals: Mapping[str, Run], *, num_rounds: int, patience: float = math.inf, progress: Progress, workload: str
) -> dict[str, Samples]:
    """Run every rival once a round.

    Args:
        rivals: name -> one repetition; they run in this order.
        num_rounds: how many rounds.
        patience: seconds after which a rival takes part in no further round; each runs at least once.
        progress: told who runs now.
        workload: for `progress`.

    Returns:
        The samples of each rival.
    """
    samples: dict[str, Samples] = {name: {} for name in rivals}
    spent = dict.fromkeys(rivals, 0.0)
    for number in range(1, num_rounds + 1):
        for name, run in rivals.items():
            if spent[name] > patience:
                continue
            progress(f"{workload}: {name}, round {number} of {num_rounds}")
            began = time.perf_counter()
            for what, value in run().items():
                samples[name].setdefault(what, []).append(value)
            spent[name] += time.perf_counter() - began
    return samples


def ratio_of(ours: Sequence[float], theirs: Sequence[float], *, more_is_better: bool = True) -> float:
    """How many times as well we did: the quotient of the medians, above 1 where we are faster."""
    quotient = statistics.median(ours) / statistics.median(theirs)
    return quotient if more_is_better else 1 / quotient
