"""The compiled forms of the tree kernel, and which of them a step runs with.

The constants of `form_for` were read off an H200 with `dendrite bench attention`: a step takes as long as its slowest
program, whose time is that of loading blocks while few rows read each key, and of multiplying them otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from dendrite.engine.batch import Plan


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One compiled form of the kernel."""

    block_m: int
    """Rows times group of a tile."""
    block_n: int
    """Keys of a block."""
    num_warps: int
    num_stages: int
    programs_per_processor: int
    use_tiles: bool = True
    """Load whole blocks with the tensor memory accelerator."""
    min_share: int = 2
    """Fewest blocks of a program, see `worklist.Tiling`."""


WIDE = KernelConfig(64, 64, num_warps=4, num_stages=3, programs_per_processor=2)
"""Many rows over each key."""
SHORT = KernelConfig(64, 32, num_warps=4, num_stages=4, programs_per_processor=2, min_share=4)
"""Few rows: shorter blocks are there sooner, and more of them are on their way."""
APART = KernelConfig(16, 64, num_warps=4, num_stages=3, programs_per_processor=2)
"""Rows that share little, or so few that they fill no larger tile: it would multiply mostly what it then masks."""
FULL_PRECISION = KernelConfig(32, 32, num_warps=4, num_stages=2, programs_per_processor=2, use_tiles=False)

MAX_APART = 24
"""Lanes, rows times group, that read a key on average, at most, for rows to count as apart."""


def forms_for(dtype: str, group: int) -> tuple[KernelConfig, ...]:
    """The forms for a model; the first is for steps of every kind."""
    if dtype == "float32":
        return (FULL_PRECISION,)
    return (WIDE, SHORT, APART) if group <= APART.block_m else (WIDE, SHORT)


def form_for(plan: Plan, forms: tuple[KernelConfig, ...], group: int) -> int:
    """Which of the forms is the fastest for a step: its index."""
    if len(forms) == 1:
        return 0
    if APART in forms and plan.num_rows * group <= APART.block_m:
        return forms.index(APART)
    num_keys = num_reads = 0
    for segment in plan.segments:
        num_keys += segment.num_keys
        num_reads += segment.num_keys * (segment.row_end - segment.row_start)
    if APART in forms and num_reads * group <= MAX_APART * num_keys:
        return forms.index(APART)
    return forms.index(SHORT if plan.num_rows * group <= SHORT.block_m else WIDE)
