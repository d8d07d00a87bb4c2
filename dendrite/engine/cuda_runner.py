"""Executes batches on a CUDA device: everything is launched, nothing is waited for.

    host     batch ─► pinned memory ─┐                     ┌─► rows of the step's outputs, still being computed
    device                           └─► static buffers ─► graph of the decoder, captured for the next larger bucket

A step too large for a graph (prefill) is launched kernel by kernel over the same modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from dendrite.engine.attention.base import AttentionBackend, AttentionStep
from dendrite.engine.attention.interface import STEP_KEYWORD
from dendrite.engine.attention.triton_tree import TritonTreeAttention
from dendrite.engine.batch import Batch
from dendrite.engine.errors import ModelError
from dendrite.engine.graphs import MAX_ROWS, Graphs, bucket_for
from dendrite.engine.ids import TRASH_BLOCK, BlockId
from dendrite.engine.kv_mover import PoolMover
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.launching import Launcher, Staging
from dendrite.engine.passes.choosing import choose_products
from dendrite.engine.passes.tuning import seconds_on_device
from dendrite.engine.runner import MAX_DRAWN, TorchRunner, known_tokens
from dendrite.engine.spec import ModelSpec
from dendrite.engine.swap import KVMover, Spans


class CudaRunner(TorchRunner):
    """Runs a model on one CUDA device, one step ahead of what the host has read."""

    look_ahead = 1
    prefill_chunk = 4096

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ModelSpec,
        *,
        kv_memory: int | None,
        block_size: int,
        attention: Callable[[KVPool, ModelSpec], AttentionBackend] = TritonTreeAttention,
    ) -> None:
        """Take a model that is on the device already; see `TorchRunner`.

        Raises:
            RequestError: `kv_memory` or `block_size` is too small for a single block, or more than is free.
            ModelError: the attention kernel is not made for the model's heads, or the device's memory is too small.
        """
        self.launcher = Launcher(model.device)
        try:
            super().__init__(
                model,
                spec,
                kv_memory=kv_memory,
                block_size=block_size,
                attention=attention,
            )
            self._inputs = torch.zeros((4, MAX_ROWS), dtype=torch.int64, device=self.device)
            self._drawn = torch.zeros(MAX_DRAWN, dtype=torch.int64, device=self.device)
            if self.launcher.is_cuda:
                with torch.cuda.device(self.device):
                    choose_products(self._decoder, self._backend, seconds_on_device)
        except torch.OutOfMemoryError as error:
            raise ModelError(f"the device's memory is too small: {error}; give a smaller kv_memory") from error
        self._graphs: Graphs[Tensor] = Graphs(self.launcher)
        self._staging = Staging(self._inputs)
        self.mover: KVMover = _LaunchedMover(self._pool, self.launcher)
        if self.launcher.is_cuda:
            torch.cuda.synchronize(self.device)  # what was made so far was made on another stream

    def run(self, batch: Batch, drawn: Tensor | None = None) -> Tensor:
        """Launch a step; see `Runner.run`. What it returns may be used while `launcher` is launching."""
        with torch.inference_mode(), self.launcher.launching():
            self._pool.copy_blocks(batch.copies)
            self._backend.prepare(batch.plan)
            num_rows, num_outputs = batch.plan.num_rows, len(batch.output_rows)
            bucket = bucket_for(num_rows)
            if bucket is None or not self._backend.can_capture(batch.plan):
                inputs = self._uploaded(batch)
                hidden = self._decode(self._backend, inputs, drawn)
            else:
                inputs = self._inputs
                self._upload(batch)
                if drawn is not None:
                    self._drawn[: len(drawn)].copy_(drawn[:MAX_DRAWN])
                key = (bucket, self._backend.variant)
                hidden = self._graphs.replay(key, partial(self._decode_bucket, bucket))
            return hidden.index_select(0, inputs[3, :num_outputs])

    def close(self) -> None:
        """Wait for what was launched, then give everything back."""
        self.launcher.synchronize()
        self._graphs.clear()
        super().close()

    def _upload(self, batch: Batch) -> None:
        """Copy what a step reads to the static inputs, without waiting."""
        _fill(self._staging.array(), batch)
        self._staging.send(self._inputs.numel())

    def _uploaded(self, batch: Batch) -> Tensor:
        """The same for a step that is too large for them: [4, num_rows]."""
        staged = self.launcher.staged((4, batch.plan.num_rows), torch.int64)
        _fill(staged.numpy(), batch)
        return self.launcher.to_device(staged)

    def _decode_bucket(self, bucket: int) -> Tensor:
        return self._decode(self._backend, self._inputs[:, :bucket], self._drawn)

    def _decode(self, backend: AttentionBackend, inputs: Tensor, drawn: Tensor | None) -> Tensor:
        # [num_rows, hidden_size]; rows beyond the step's are padding
        token_ids, positions, slots, _ = inputs
        step = AttentionStep(backend, slots)
        output = self._decoder(
            input_ids=known_tokens(token_ids, drawn).unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            **{STEP_KEYWORD: step},
        )
        step.check_complete(self.spec.num_layers)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


def _fill(inputs: NDArray[np.int64], batch: Batch) -> None:
    """Write token ids, positions, slots and output rows to `inputs`, [4, num_rows or more].

    Padding rows compute token 0 at position 0 and write to the trash block.
    """
    num_rows, num_outputs = batch.plan.num_rows, len(batch.output_rows)
    inputs[0, :num_rows] = batch.token_ids
    inputs[1, :num_rows] = batch.positions
    inputs[2, :num_rows] = batch.slots
    inputs[:2, num_rows:] = 0
    inputs[2, num_rows:] = TRASH_BLOCK
    inputs[3, :num_outputs] = batch.output_rows


class _LaunchedMover(PoolMover):
    """Moves K/V on the stream of the steps, so that each copy lies between the steps it was asked for between."""

    def __init__(self, pool: KVPool, launcher: Launcher) -> None:
        super().__init__(pool)
        self._launcher = launcher

    def save(self, spans: Spans) -> Tensor:
        """See `PoolMover.save`."""
        with torch.inference_mode(), self._launcher.launching():
            return super().save(spans)

    def load(self, saved: object, slots: Sequence[int]) -> None:
        """See `PoolMover.load`."""
        with torch.inference_mode(), self._launcher.launching():
            super().load(saved, slots)

    def digests(self, block_ids: Sequence[BlockId]) -> list[int]:
        """See `PoolMover.digests`; waits for the steps in flight."""
        with torch.inference_mode(), self._launcher.launching():
            return super().digests(block_ids)

    def copy_blocks(self, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See `PoolMover.copy_blocks`."""
        with torch.inference_mode(), self._launcher.launching():
            super().copy_blocks(copies)
