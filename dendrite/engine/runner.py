"""Executes a batch: token ids in, final hidden rows out, K/V kept in the pool."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from dendrite.engine.attention.base import AttentionBackend, AttentionStep
from dendrite.engine.attention.cpu import TreeAttention
from dendrite.engine.attention.interface import STEP_KEYWORD
from dendrite.engine.batch import Batch
from dendrite.engine.crowding import Crowding
from dendrite.engine.heap import HEAP
from dendrite.engine.invariance import check_invariance
from dendrite.engine.kv_mover import PoolMover
from dendrite.engine.kv_pool import KVPool, default_swap_bytes, num_blocks_for
from dendrite.engine.passes import optimise
from dendrite.engine.snapshot import fingerprint
from dendrite.engine.spec import ModelSpec
from dendrite.engine.swap import KVMover

MAX_DRAWN = 4096
"""Draws of a step that the step after can compute before they are read; what comes behind them waits."""


class Runner(Protocol):
    """What the engine needs of whatever runs a model; a scripted one stands in for tests."""

    spec: ModelSpec
    num_blocks: int
    """Usable K/V blocks, ids 1 to `num_blocks`; the trash block comes on top."""
    block_size: int
    fingerprint: str
    """Tells this model in this dtype from any other; snapshots carry it."""
    mover: KVMover
    """Takes K/V out of the pool and puts it back."""
    default_swap_bytes: int
    """Host memory for K/V outside the pool, unless the user says how much."""
    look_ahead: int
    """How many steps may be in flight while the next one is launched: 0 where `run` computes, 1 where it only launches
    work on a device, which does everything it is given in that order."""

    prefill_chunk: int
    """Most prompt tokens of a step unless the configuration says: enough to keep the processor busy, and no more, so
    that a long prompt does not stall branches that decode."""

    def run(self, batch: Batch, drawn: Tensor | None = None) -> Tensor:
        """Compute a step; the final hidden states of its output rows, [num_outputs, hidden_size].

        A negative token id `-1 - i` stands for `drawn[i]`, a token that the step before drew and nobody has read yet.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """The head over hidden states [n, hidden_size]: [n, vocab_size]."""

    def close(self) -> None:
        """Give the model and the pool back."""


class TorchRunner:
    """Runs Transformers' modules over the pool, tokens packed as one row `[1, num_rows]`."""

    look_ahead = 0
    prefill_chunk = 512

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ModelSpec,
        *,
        kv_memory: int | None,
        block_size: int,
        attention: Callable[[KVPool, ModelSpec], AttentionBackend] = TreeAttention,
        steady: bool = False,
    ) -> None:
        """Take a model that was loaded with `attn_implementation="dendrite"`, make it fast, allocate its pool.

        The model's modules are replaced in place, so it is good for nothing else afterwards.

        Args:
            model: in eval mode.
            spec: its dimensions.
            kv_memory: bytes of the pool; None is a share of what is free.
            block_size: tokens in a block.
            attention: the back end.
            steady: use modules whose rows do not depend on how many there are (`passes.steady`), and check it.

        Raises:
            RequestError: `kv_memory` or `block_size` is too small for a single block.
            ModelError: `steady` cannot be had on this machine.
        """
        num_blocks = num_blocks_for(spec, kv_memory=kv_memory, block_size=block_size, device=model.device)
        self.spec = spec
        kind = f"{model.config.model_type} {spec.dtype}{' deterministic' if steady else ''}"
        self.fingerprint = fingerprint(dict(model.named_parameters()), kind)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = model.device
        self.dtype = model.dtype
        self._pool = KVPool(spec, num_blocks=num_blocks, block_size=block_size, device=model.device)
        self.mover: KVMover = PoolMover(self._pool)
        self.default_swap_bytes = default_swap_bytes(spec.bytes_per_token * block_size * num_blocks)
        self._backend = attention(self._pool, spec)
        optimise(model, steady=steady)
        self._decoder: nn.Module = model.get_decoder()
        self._head = _head_of(model, self._decoder)
        # Another number of threads may round otherwise.
        self._watching: Callable[[], AbstractContextManager[None]] = nullcontext if steady else Crowding().watching
        if steady:
            check_invariance(self._decoder, self.logits, spec)
        self._release_heap = HEAP.hold(self)

    def run(self, batch: Batch, drawn: Tensor | None = None) -> Tensor:
        """Copy blocks, run the layers, keep the rows' K/V.

        Args:
            batch: the step.
            drawn: [num_drawn] int64, what negative token ids stand for; see `Runner.run`.

        Returns:
            [num_outputs, hidden_size], after the final norm, in the order of `batch.output_rows`.

        Raises:
            ModelError: a layer did not attend exactly once.
        """
        with torch.inference_mode(), self._watching():
            self._pool.copy_blocks(batch.copies)
            self._backend.prepare(batch.plan)
            step = AttentionStep(self._backend, self._tensor(batch.slots))
            output = self._decoder(
                input_ids=known_tokens(self._tensor(batch.token_ids), drawn).unsqueeze(0),
                position_ids=self._tensor(batch.positions).unsqueeze(0),
                use_cache=False,
                **{STEP_KEYWORD: step},
            )
            step.check_complete(self.spec.num_layers)
            hidden: Tensor = output.last_hidden_state[0]
            return hidden.index_select(0, self._tensor(batch.output_rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the model's own head, with whatever its family does after it (scales, biases).

        Args:
            hidden: [n, hidden_size], rows that `run` returned.

        Returns:
            [n, vocab_size], in the model's dtype.
        """
        with torch.inference_mode():
            logits: Tensor = self._head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
            return logits[0]

    def close(self) -> None:
        """Drop the model and the pool; the runner cannot be used again."""
        self._pool.close()
        del self._decoder, self._head, self._backend, self._pool, self.mover
        self._release_heap()

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def known_tokens(token_ids: Tensor, drawn: Tensor | None) -> Tensor:
    """Token ids [num_rows] with `drawn[-1 - id]` in the place of negative ones."""
    if drawn is None:
        return token_ids
    # A draw from spoilt logits is -1; its row is discarded, but has to compute something until that is known.
    return torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp_(min=0)].clamp_(min=0), token_ids)


@dataclass
class _HiddenOnly(MoeModelOutputWithPast):
    """A decoder's output with every field that some family's head passes on; all but the hidden state are None."""

    cross_attentions: None = None


class _Given(nn.Module):
    """Stands where the decoder was: what comes in as embeddings goes out as the final hidden state."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _HiddenOnly:
        """Return `inputs_embeds` [1, n, hidden_size] unchanged."""
        return _HiddenOnly(last_hidden_state=inputs_embeds)


def _head_of(model: nn.Module, decoder: nn.Module) -> nn.Module:
    """A shallow copy of the model that shares everything but its decoder, which only passes hidden states on.

    model ── lm_head            copy ── lm_head (shared)
          └─ model (decoder)         └─ model: _Given
    """
    path = next(name for name, module in model.named_modules() if module is decoder)
    return _replaced(model, path.split("."), _Given())


def _replaced(module: nn.Module, path: list[str], leaf: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone.__dict__["_modules"] = dict(module.__dict__["_modules"])  # a copy shares the dictionary itself
    name = path[0]
    setattr(clone, name, leaf if len(path) == 1 else _replaced(module.get_submodule(name), path[1:], leaf))
    return clone
