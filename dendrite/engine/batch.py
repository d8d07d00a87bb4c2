"""What one step runs: index lists without torch, from the tree to the runner.

Rows are the packed tokens of the step, `[num_rows]`, ordered depth-first over the tree so that the queries under any
segment are one contiguous range of rows:

    tree                       rows            segments (keys)          rows that read them
    system ──┬── a ── a1       0  a1's token   system  [0, 512)         0..3
             │    └── a2       1  a2's token   a       [512, 540)       0..2
             └── b             2  b's token    a1, a2, b                one each
"""

from __future__ import annotations

from dataclasses import dataclass

from dendrite.engine.ids import BlockId


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of keys that the same rows read.

    Row `row_start + i` for `i < causal_rows` is the query of the segment's own key `num_keys - causal_rows + i`, so it
    reads the keys up to and including that one (a chunk attending to itself). Every row from
    `row_start + causal_rows` to `row_end` reads all keys.
    """

    spans: tuple[tuple[int, int], ...]
    """Slot ranges `[first, last)` in key order, contiguous blocks joined; slot = block_id * block_size + offset."""
    num_keys: int
    row_start: int
    row_end: int
    causal_rows: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rows read which keys in one step. The segments of one row, root first, are its whole path to itself."""

    num_rows: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work for the runner."""

    token_ids: list[int]
    """[num_rows], packed."""
    positions: list[int]
    """[num_rows], absolute positions in each row's own path."""
    slots: list[int]
    """[num_rows], where each row's K/V is written (a slot of the trash block where it must not be kept)."""
    plan: Plan
    copies: list[tuple[BlockId, BlockId]]
    """Copy-on-write, `(source, destination)`: whole blocks of all layers, copied before anything is written."""
    output_rows: list[int]
    """[num_outputs], the rows whose final hidden state the step must give back."""
