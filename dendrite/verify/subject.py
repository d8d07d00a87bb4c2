"""What is verified: an engine of the very parts that `Engine.load` puts together, with a window on its logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dendrite.engine.batch import Batch
from dendrite.engine.branch import Branch
from dendrite.engine.config import EngineConfig
from dendrite.engine.devices import runner_and_head
from dendrite.engine.engine import Engine
from dendrite.engine.models import LoadedModel, load_model
from dendrite.engine.runner import Runner
from dendrite.engine.swap import KVMover
from dendrite.engine.text import HFTokenizer

POOL_TOKENS = 8192
"""Room of the K/V pool: all prompts at once, with what they generate."""
FORCED = 1e9
"""A bias that makes a token certain, while the logits that are recorded stay the model's own."""


class Load(Protocol):
    """How the engine's copy of the model is loaded; `load_model`, unless a test breaks it on purpose."""

    def __call__(self, name: str, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
        """See `load_model`."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What must not change a single token."""

    block_size: int = 16
    prefill_chunk: int = 512
    device: str = "cpu"

    def __str__(self) -> str:
        return f"blocks of {self.block_size}, chunks of {self.prefill_chunk}"


class Recorder:
    """A runner that keeps the logits it gives while asked to."""

    look_ahead = 0  # so that the host draws, from the logits that are kept here

    def __init__(self, runner: Runner) -> None:
        self.spec = runner.spec
        self.num_blocks = runner.num_blocks
        self.block_size = runner.block_size
        self.mover: KVMover = runner.mover
        self.fingerprint = runner.fingerprint
        self.default_swap_bytes = runner.default_swap_bytes
        self.prefill_chunk = runner.prefill_chunk
        self.rows: list[Tensor] | None = None
        self._runner = runner

    def run(self, batch: Batch, drawn: Tensor | None = None) -> Tensor:
        """Compute a step, and wait for it: what follows on the host reads it on another stream than it is made on."""
        hidden = self._runner.run(batch, drawn)
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The head over hidden states, kept if someone records."""
        logits = self._runner.logits(hidden)
        if self.rows is not None:
            self.rows.extend(logits.float().cpu().clone())
        return logits

    def close(self) -> None:
        """Close the runner."""
        self._runner.close()


class Subject:
    """One engine under test."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self.engine = engine
        self._recorder = recorder

    def greedy(self, branch: Branch, num_tokens: int) -> tuple[list[int], Tensor]:
        """Greedy tokens and the logits that each was taken from, `[num_tokens, vocab_size]`, float32.

        Nothing else may be running.
        """
        rows = self._recorder.rows = []
        try:
            out = branch.generate(max_tokens=num_tokens, ignore_eos=True)
        finally:
            self._recorder.rows = None
        return list(out.token_ids), torch.stack(rows)

    def forced(self, branch: Branch, token_ids: Sequence[int]) -> Tensor:
        """The logits before each of these tokens, which the branch is made to take, `[num_tokens, vocab_size]`."""
        rows = self._recorder.rows = []
        try:
            for token in token_ids:
                branch.generate(max_tokens=1, ignore_eos=True, logit_bias={token: FORCED})
        finally:
            self._recorder.rows = None
        return torch.stack(rows)


@contextmanager
def opened(name: str, *, dtype: str, setup: Setup, load: Load = load_model) -> Iterator[Subject]:
    """An engine with this set-up, closed at the end. The host draws, from logits that can be kept."""
    loaded = load(name, dtype=dtype, device=setup.device)
    config = _config(loaded, setup)
    runner, _ = runner_and_head(loaded.model, loaded.spec, config)
    recorder = Recorder(runner)
    with Engine(recorder, HFTokenizer(loaded.tokenizer, loaded.eos_token_ids), config) as engine:
        yield Subject(engine, recorder)


@contextmanager
def opened_whole(name: str, *, dtype: str, setup: Setup, load: Load = load_model) -> Iterator[Engine]:
    """An engine with this set-up as users get it, which on a CUDA device draws there and looks ahead."""
    loaded = load(name, dtype=dtype, device=setup.device)
    tokenizer = HFTokenizer(loaded.tokenizer, loaded.eos_token_ids)
    with Engine.of(loaded.model, loaded.spec, tokenizer, _config(loaded, setup)) as engine:
        yield engine


def _config(loaded: LoadedModel, setup: Setup) -> EngineConfig:
    return EngineConfig.of(
        dtype=loaded.spec.dtype,
        device=setup.device,
        kv_memory=loaded.spec.bytes_per_token * POOL_TOKENS,
        block_size=setup.block_size,
        prefill_chunk=setup.prefill_chunk,
    )
