"""What is aimed at on a machine that was measured before: the case -> the most its figure may be."""

from __future__ import annotations

from dendrite.bench.cases import Case

H200_8B = {
    "decode: batch 1": 4.5,
    "decode: batch 64": 5.5,
    "fanout: 64 × 128 over 8,192": 850.0,
    "fanout: 8 × 128 over 32,768": 750.0,
    "fanout: 64 × 128 over 32,768": 1100.0,
    "first-token: 1 child of 32,768": 6.0,
    "first-token: 8 children of 32,768": 8.0,
    "tot: depth 4, branch 5, keep 5, 48 tokens": 950.0,
    "mcts: 32 iterations, 3 × 32 tokens": 4800.0,
}
GOALS = {("8b", "H200"): H200_8B}
"""(shape, part of the GPU's name) -> goals by `Case.name`, in milliseconds."""


def goal_of(case: Case, *, shape: str | None, gpu: str) -> float | None:
    """The goal for a case, None where nothing was aimed at."""
    goals = next((goals for (name, part), goals in GOALS.items() if name == shape and part in gpu), {})
    return goals.get(case.name)
