"""A few rounds of the soak: every round ends with an empty engine, and the process holds no more than before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.engine.soak import Footprint, rounds, scripted

MOST_OBJECTS = 400
"""That later rounds may leave more than earlier ones: caches of the interpreter and of libraries."""
MOST_BYTES = 16 << 20
FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}


def check_flat(found: Iterator[Footprint], *, num_rounds: int) -> None:
    """The first rounds fill caches; the least of the last ones is held against the least of those in the middle."""
    held = list(islice(found, num_rounds))
    middle, last = held[num_rounds // 3 : 2 * num_rounds // 3], held[2 * num_rounds // 3 :]
    assert min(each.objects for each in last) - min(each.objects for each in middle) < MOST_OBJECTS
    assert min(each.rss_bytes for each in last) - min(each.rss_bytes for each in middle) < MOST_BYTES


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_thousands_of_forks_leave_nothing_behind() -> None:
    """Under pressure, with canaries, cancelled calls and snapshots."""
    with scripted() as engine:
        check_flat(rounds(engine, 0, searches=1), num_rounds=6)
        assert engine.stats().forks > 3000
        assert engine.stats().tokens_swapped_out > 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_model_leaves_nothing_behind(tiny_folder: Callable[[str], Path]) -> None:
    """The same traffic over tensors; oneDNN, which keeps a compiled kernel for each of the last shapes, keeps few."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.soak", "--rounds=6", "--searches=1", f"--model={tiny_folder('llama')}"],
        env=os.environ | FEW_KERNELS,
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    numbers = [[int(word) for word in line.split() if word.isdigit()] for line in done.stdout.splitlines()]
    assert numbers[-1][0] > 2500
    check_flat((Footprint(kib << 10, objects) for _, kib, objects in numbers), num_rounds=6)
