"""What a loaded model needs is not walked by the garbage collector, and is collected once the engine is closed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dendrite.engine.engine import Engine
from dendrite.engine.heap import _Heap


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    """Engines of other tests may hold the heap meanwhile; here the count is looked at."""
    gc.unfreeze()
    yield
    gc.unfreeze()


class Owner:
    """Somebody."""


def test_the_last_of_two_gives_it_back() -> None:
    """What two engines hold stays aside until both are closed; closing twice is closing once."""
    heap, first, second = _Heap(), Owner(), Owner()
    release = heap.hold(first)
    held = gc.get_freeze_count()
    assert held > 10_000
    heap.hold(second)
    release()
    release()
    assert gc.get_freeze_count() >= held - 1_000  # objects that are freed by their counts leave it
    del second  # never closed
    assert gc.get_freeze_count() == 0


def test_what_the_program_froze_itself_stays_frozen() -> None:
    """A server that has called `gc.freeze` finds it as it was."""
    gc.freeze()
    owner = Owner()
    _Heap().hold(owner)()
    assert gc.get_freeze_count() > 0


def test_a_closed_engine_leaves_nothing_behind(tiny_folder: Callable[[str], Path]) -> None:
    """Its model is collected, though it was there when the heap was set aside."""
    engine = Engine.load(str(tiny_folder("llama")), kv_memory="1MiB")
    runner = engine.core.loop._runner
    decoder = weakref.ref(runner._decoder)  # type: ignore[attr-defined] # of the runner that runs models
    engine.close()
    del engine, runner
    gc.collect()
    assert decoder() is None
