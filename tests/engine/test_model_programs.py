"""Random tree programs on a tiny transformer in a pool that is too small, against forward passes from scratch.

The list-of-tokens machine (`test_tree_model.py`) sees every slot; this one sees what comes of them: positions, masks,
copies, moves out of the pool and back, snapshots, all through the public surface and a real model.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from transformers import AutoModelForCausalLM, PreTrainedModel

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from tests.models_zoo import EXACT, save_tiny_model

TOKENS = st.lists(st.integers(4, 290), min_size=1, max_size=9)
MOST_TOKENS = 60
CLOSE = 1e-3
"""Log-probabilities in float32, whatever was cached, copied, moved or computed again."""


@cache
def folder() -> Path:
    return save_tiny_model(Path(tempfile.mkdtemp(prefix="dendrite-programs-")), EXACT["llama"]())


@cache
def engine() -> Engine:
    """One for all programs, which must leave it empty: 24 blocks of 4 tokens, and as much host memory."""
    probe = Engine.load(str(folder()), dtype="float32", block_size=4, kv_memory="1MiB")
    block_bytes = probe.stats().block_bytes
    probe.close()
    return Engine.load(
        str(folder()), dtype="float32", block_size=4, kv_memory=25 * block_bytes, swap_memory=10 * block_bytes
    )


@cache
def reference() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    return model


@pytest.fixture(scope="module", autouse=True)
def _cleared_away() -> Iterator[None]:
    yield
    engine().close()
    shutil.rmtree(folder())


def logprobs_after(tokens: list[int]) -> torch.Tensor:
    """[num_tokens, vocab_size], by one plain forward pass."""
    with torch.inference_mode():
        logits: torch.Tensor = reference()(input_ids=torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


class ProgramMachine(RuleBasedStateMachine):
    """What each branch says is what the whole model says of its tokens."""

    branches = Bundle("branches")

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[Branch, list[int]] = {}

    def keep(self, branch: Branch, tokens: list[int]) -> Branch:
        self.model[branch] = tokens
        return branch

    @rule(target=branches, tokens=TOKENS)
    def root(self, tokens: list[int]) -> Branch:
        return self.keep(engine().root(token_ids=tokens), list(tokens))

    @rule(target=branches, branch=branches, data=st.data())
    def fork(self, branch: Branch, data: st.DataObject) -> Branch:
        at = data.draw(st.none() | st.integers(1, branch.num_tokens))
        return self.keep(branch.fork(1, at=at)[0], self.model[branch][:at])

    @rule(branch=branches, tokens=TOKENS)
    def append(self, branch: Branch, tokens: list[int]) -> None:
        if branch.num_tokens + len(tokens) <= MOST_TOKENS:
            branch.append(tokens)
            self.model[branch] += tokens

    @precondition(lambda self: self.model)
    @rule(data=st.data(), num=st.integers(1, 4))
    def generate(self, data: st.DataObject, num: int) -> None:
        """Several at once: each greedy token is the reference's, or as likely."""
        chosen = data.draw(st.lists(st.sampled_from(list(self.model)), min_size=1, max_size=4, unique_by=id))
        chosen = [branch for branch in chosen if branch.num_tokens + num <= MOST_TOKENS]
        if not chosen:
            return
        for branch, out in zip(chosen, engine().generate(chosen, max_tokens=num, ignore_eos=True), strict=True):
            tokens = self.model[branch]
            start = len(tokens)
            tokens += out.token_ids
            rows = logprobs_after(tokens)[start - 1 : -1]
            assert len(out.token_ids) == num
            for row, token, logprob in zip(rows, out.token_ids, out.logprobs, strict=True):
                assert row.max() - row[token] < CLOSE
                assert logprob == pytest.approx(row[token].item(), abs=CLOSE)

    @rule(branch=branches, choices=st.lists(TOKENS, min_size=1, max_size=3))
    def score(self, branch: Branch, choices: list[list[int]]) -> None:
        for choice, found in zip(choices, engine().score_tokens(branch, choices), strict=True):
            tokens = self.model[branch] + choice
            rows = logprobs_after(tokens)[len(self.model[branch]) - 1 : -1]
            assert found == pytest.approx(
                [row[token].item() for row, token in zip(rows, choice, strict=True)], abs=CLOSE
            )

    @rule(branch=consumes(branches))
    def prune(self, branch: Branch) -> None:
        branch.prune()
        del self.model[branch]

    @rule(target=branches, branch=branches, kv=st.booleans())
    def save_and_restore(self, branch: Branch, *, kv: bool) -> Branch:
        with tempfile.TemporaryDirectory() as place:
            branch.save(Path(place) / "one", kv=kv)
            return self.keep(engine().restore(Path(place) / "one"), list(self.model[branch]))

    @rule(value=st.floats(0, 1), branch=branches)
    def value(self, branch: Branch, value: float) -> None:
        branch.value = value

    @rule()
    def preempt(self) -> None:
        """Everything leaves the pool: what the scheduler does when it needs all of it for somebody else."""
        core = engine().core
        with core.loop.lock:
            core.loop.scheduler._pressure.make_room(core._tree.pool.num_total, [])

    @rule()
    def clear_cache(self) -> None:
        engine().clear_cache()

    @invariant()
    def agrees(self) -> None:
        engine().check_integrity()
        for branch, tokens in self.model.items():
            assert branch.token_ids == tokens

    def teardown(self) -> None:
        for branch in self.model:
            branch.prune()
        self.model.clear()
        engine().clear_cache()
        stats = engine().stats()
        assert (stats.blocks_free, stats.swap_memory_used) == (stats.blocks_total, 0)


TestPrograms = ProgramMachine.TestCase
TestPrograms.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
