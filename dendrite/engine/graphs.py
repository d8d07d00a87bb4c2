"""CUDA graphs: a launch of hundreds of kernels, recorded once and replayed as one.

A graph replays with the shapes and addresses it was captured with. So rows are padded to a few numbers, and everything
that differs from step to step lies in static buffers that are filled before the replay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

from dendrite.engine.launching import Launcher

BUCKETS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
"""Numbers of rows that graphs are captured for. A step is padded to the next one; a larger step is launched plainly."""
MAX_ROWS = BUCKETS[-1]

T = TypeVar("T")


def bucket_for(num_rows: int) -> int | None:
    """The number of rows that a step of `num_rows` is padded to; None if it is too large for a graph."""
    return BUCKETS[bisect_left(BUCKETS, num_rows)] if num_rows <= MAX_ROWS else None


class Graphs(Generic[T]):
    """Captured launches by key; they share memory, so they are replayed on one stream. On the CPU none is captured."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._memory = torch.cuda.graph_pool_handle() if launcher.is_cuda else None
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, T]] = {}

    def replay(self, key: Hashable, launch: Callable[[], T]) -> T:
        """Launch what was captured under `key`, capturing `launch` first if nothing was.

        Returns:
            What `launch` returned when it was captured: the same tensors each time, valid until the next replay.
        """
        if not self._launcher.is_cuda:
            return launch()
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(launch)
        graph, outputs = captured
        graph.replay()
        return outputs

    def clear(self) -> None:
        """Give the graphs' memory back; nothing may be in flight."""
        self._captured.clear()

    def _capture(self, launch: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        launch()  # compiles kernels and makes libraries allocate their workspaces, neither of which can be captured
        graph = torch.cuda.CUDAGraph()
        stream = self._launcher.stream
        # Other threads may use the device meanwhile: another engine, or the user's own models.
        with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            outputs = launch()
        return graph, outputs
