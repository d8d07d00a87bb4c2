"""What a step's attention costs by each way to compute it: a model with three constants, measured on the device.

    seconds of a layer = fixed + per_read * keys that are read + per_pair * (row, key) pairs that are multiplied

The tree kernel reads a shared key once and multiplies what is asked for. FlashInfer's prefill reads every request's
whole path and multiplies whole tiles of rows, so that a request of a single row costs as much as one of a tile.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dendrite.engine.attention.page_tables import row_bounds
from dendrite.engine.batch import Plan

TILE_ROWS = 128
"""Rows that FlashInfer's prefill multiplies at once, fewer being padded: what its kernels for Hopper GPUs do."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a plan asks of one way to compute it."""

    num_reads: float
    num_pairs: float


@dataclass(frozen=True, slots=True)
class Cost:
    """The model's constants, in seconds."""

    fixed: float
    per_read: float
    per_pair: float

    def seconds(self, work: Work) -> float:
        """What a layer takes, by the model."""
        return self.fixed + self.per_read * work.num_reads + self.per_pair * work.num_pairs


def tree_work(plan: Plan) -> Work:
    """Of a kernel that reads each key once for all rows under it."""
    num_reads = num_pairs = 0
    for segment in plan.segments:
        num_reads += segment.num_keys
        num_pairs += segment.num_keys * (segment.row_end - segment.row_start)
        num_pairs -= segment.causal_rows * (segment.causal_rows - 1) // 2
    return Work(num_reads, num_pairs)


def paged_work(plan: Plan) -> Work:
    """Of a kernel that is given requests, each with its whole path."""
    bounds = np.array(row_bounds(plan))
    change = np.zeros(plan.num_rows + 1)
    for segment in plan.segments:
        change[segment.row_start] += segment.num_keys
        change[segment.row_end] -= segment.num_keys
    num_keys, num_rows = np.cumsum(change)[bounds[:-1]], np.diff(bounds)
    padded = -(-num_rows // TILE_ROWS) * TILE_ROWS
    return Work(float(num_keys.sum()), float((padded * (num_keys - (num_rows - 1) / 2)).sum()))


def fitted(works: Sequence[Work], seconds: Sequence[float]) -> Cost:
    """The constants that fit measurements with the least relative errors; none of them is negative."""
    measured = np.array(seconds)
    terms = np.array([[1.0, work.num_reads, work.num_pairs] for work in works]) / measured[:, None]
    used, constants = [0, 1, 2], np.zeros(3)
    while used:
        constants = np.zeros(3)
        scale = np.abs(terms[:, used]).max(axis=0)  # counts of pairs are a billion times larger than 1
        constants[used] = np.linalg.lstsq(terms[:, used] / scale, np.ones(len(works)))[0] / scale
        if (constants >= 0).all():
            break
        used.remove(int(np.argmin(constants * np.abs(terms).max(axis=0))))
    fixed, per_read, per_pair = constants.tolist()
    return Cost(fixed, per_read, per_pair)


def stored_costs(folder: Path, key: str, names: Sequence[str]) -> list[Cost] | None:
    """What was measured under `key` and kept, in the order of the names; None if nothing was, or it is damaged."""
    try:
        kept = json.loads(_file(folder, key).read_text(encoding="utf-8"))
        costs = [Cost(*map(float, kept["costs"][name])) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return costs if kept.get("key") == key else None


def store_costs(folder: Path, key: str, costs: dict[str, Cost]) -> None:
    """Keep what was measured under `key`; a folder that cannot be written keeps nothing, and loading measures again."""
    kept = {"key": key, "costs": {name: [cost.fixed, cost.per_read, cost.per_pair] for name, cost in costs.items()}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(kept, file, indent=1)
        Path(name).replace(_file(folder, key))  # whole or not at all: other processes load meanwhile
    except OSError:
        return


def _file(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
