"""What an attention back end is: it prepares a plan once a step and runs it once a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

from torch import Tensor

from dendrite.engine.batch import Plan
from dendrite.engine.errors import ModelError
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec


class AttentionBackend(ABC):
    """Attention of a step's rows over the keys and values in the pool.

        prepare(plan)                        index tensors and masks, whatever does not depend on the layer
        run(0, q) run(1, q) ... run(L-1, q)  one layer each; the rows' own K/V is in the pool already

    A back end keeps one prepared plan at a time. One that replays captured graphs fills its static buffers in
    `prepare` and launches in `run`.
    """

    def __init__(self, pool: KVPool, spec: ModelSpec) -> None:
        self.pool = pool
        self.spec = spec

    @abstractmethod
    def prepare(self, plan: Plan) -> None:
        """Take the next step's plan; it replaces the one before."""

    @abstractmethod
    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend.

        Args:
            layer: which layer's K/V to read.
            query: [num_rows, num_heads, head_dim], the pool's dtype; `num_heads` is a multiple of the K/V heads'. A
                back end that replays captured graphs takes more rows than were planned, which pad them to a bucket.
            scale: what scores are multiplied by before the softmax.

        Returns:
            [num_rows, num_heads, head_dim], the query's dtype; what padding rows hold means nothing.
        """

    @property
    def variant(self) -> Hashable:
        """Which kernels the prepared plan runs with: a graph captured with one variant serves its plans only."""
        return None

    def can_capture(self, plan: Plan) -> bool:  # noqa: ARG002, a back end without graphs captures none
        """Whether `run` may be captured in a graph that later plans replay, `prepare` alone between them."""
        return False


class AttentionStep:
    """One forward's attention: it travels through the model's keyword arguments down to every layer."""

    def __init__(self, backend: AttentionBackend, slots: Tensor) -> None:
        self.backend = backend
        self.slots = slots
        """[num_rows], where each row's K/V is kept."""
        self.layers_run: list[int] = []
        """Layers in the order they attended; a model that runs exactly gives 0, 1, ... once each."""

    def attend(self, layer: int, query: Tensor, kv: Tensor, scale: float) -> Tensor:
        """Keep the rows' K/V, then attend.

        Args:
            layer: the layer that calls.
            query: [num_rows, num_heads, head_dim].
            kv: [num_rows, 2, num_kv_heads, head_dim].
            scale: what scores are multiplied by.

        Returns:
            [num_rows, num_heads, head_dim].
        """
        self.backend.pool.write(layer, self.slots, kv)
        return self.attend_kept(layer, query, scale)

    def kept(self, layer: int) -> Tensor:
        """Where a layer that keeps its own K/V writes it, at `slots`: [2, num_kv_heads, num_slots, head_dim]."""
        return self.backend.pool.layers[layer]

    def all_kept(self, num_layers: int) -> Tensor:
        """For whoever runs all layers as one: their K/V, [num_layers, 2, num_kv_heads, num_slots, head_dim]."""
        self.layers_run.extend(range(num_layers))
        return self.backend.pool.data

    def attend_kept(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend, for a layer that has written its rows' K/V to `kept(layer)`; otherwise as `attend`."""
        self.layers_run.append(layer)
        return self.backend.run(layer, query, scale)

    def check_complete(self, num_layers: int) -> None:
        """Raise unless every layer attended exactly once, in order.

        Raises:
            ModelError: a layer skipped the attention function or called it twice, so the output cannot be trusted.
        """
        if self.layers_run != list(range(num_layers)):
            raise ModelError(
                f"the model's {num_layers} layers called attention as {self.layers_run}, not once each in order: "
                "it would not run exactly"
            )
