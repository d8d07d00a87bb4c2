"""Random traffic on a tiny transformer: every branch's next token and scores against a forward pass from scratch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.engine.errors import OutOfBlocks
from dendrite.engine.runner import TorchRunner


@pytest.fixture(autouse=True, params=[0, 1], ids=["in step", "looking ahead"])
def _look_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs twice: as on the CPU, and with a step in flight while the next one is launched."""
    monkeypatch.setattr(TorchRunner, "look_ahead", request.param)


def next_logits(reference: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """[vocab_size] logits after the path, by a plain forward pass."""
    with torch.inference_mode():
        logits: torch.Tensor = reference(input_ids=torch.tensor([token_ids])).logits[0, -1]
    return logits


def check(branch: Branch, reference: PreTrainedModel) -> None:
    """The branch's greedy token is the reference's, and a score of two tokens is its log-probability."""
    path = branch.token_ids
    logits = next_logits(reference, path)
    with branch.fork() as probe:
        out = probe.generate(max_tokens=1, ignore_eos=True)
        assert logits.max() - logits[out.token_ids[0]] < 1e-4
        assert out.logprobs[0] == pytest.approx(logits.log_softmax(-1)[out.token_ids[0]].item(), abs=1e-4)
    (scored,) = branch.engine.score_tokens(branch, ["q z"])
    tokens = branch.engine.tokenizer.encode("q z")
    for index, (token, logprob) in enumerate(zip(tokens, scored, strict=True)):
        expected = next_logits(reference, path + tokens[:index]).log_softmax(-1)[token].item()
        assert logprob == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_random_traffic_agrees_with_a_forward_from_scratch(tiny_folder: Callable[[str], Path], block_size: int) -> None:
    """120 random calls over one tree, each followed by integrity; then every branch is checked."""
    rng = random.Random(block_size)
    folder = tiny_folder("qwen3")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with Engine.load(str(folder), dtype="float32", block_size=block_size, kv_memory="4MiB") as engine:
        live = [engine.root(token_ids=[rng.randrange(4, 300) for _ in range(rng.randint(1, 40))])]
        for _ in range(120):
            branch = rng.choice(live)
            action = rng.random()
            if action < 0.25 and len(live) < 24:
                live += branch.fork(rng.randint(1, 3), at=rng.choice([None, rng.randint(1, branch.num_tokens)]))
            elif action < 0.45 and branch.num_tokens < 150:
                branch.append([rng.randrange(4, 300) for _ in range(rng.randint(1, 20))])
            elif action < 0.75:
                chosen = [each for each in rng.sample(live, min(len(live), 6)) if each.num_tokens < 150]
                if chosen:
                    engine.generate(chosen, max_tokens=rng.randint(1, 12), temperature=1.0, ignore_eos=True)
            elif action < 0.9 and len(live) > 1:
                live.remove(branch)
                branch.prune()
            else:
                branch.score(["a", "b c d", "ee f"])
            engine.check_integrity()
        for branch in live:
            check(branch, reference)
        for branch in live:
            branch.prune()
        del branch
        engine.check_integrity()
        assert engine.stats().blocks_used == 0
        engine.clear_cache()
        assert engine.stats().blocks_free == engine.stats().blocks_total


async def test_concurrent_tasks_with_cancellations_leak_nothing(tiny_folder: Callable[[str], Path]) -> None:
    """A hundred tasks fork, generate, score and are cancelled at random; the pool is whole and a new call is right."""
    rng = random.Random(5)
    folder = tiny_folder("llama")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    async with Engine.load(str(folder), dtype="float32", kv_memory="8MiB") as engine:
        root = engine.root(token_ids=[7, 8, 9] * 10)

        async def work() -> None:
            with root.fork() as branch:
                await branch.agenerate(max_tokens=rng.randint(1, 30), temperature=1.0, ignore_eos=True)
                await branch.ascore(["a b", "c"])
                children = branch.fork(3)
                await engine.agenerate(children, max_tokens=rng.randint(1, 20), temperature=1.0)

        tasks = [asyncio.create_task(work()) for _ in range(100)]
        for task in rng.sample(tasks, 60):
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        engine.check_integrity()
        assert root.status == "idle"
        check(root, reference)
        del tasks, outcomes


def test_a_tenth_of_the_memory_is_enough(tiny_folder: Callable[[str], Path]) -> None:
    """32 branches in a pool for two run in turns; one that would not fit alone is refused, and nothing leaks."""
    folder = tiny_folder("llama")
    with Engine.load(str(folder), dtype="float32", kv_memory="48KiB", block_size=8) as engine:
        root = engine.root(token_ids=[5] * 20)
        total = engine.stats().blocks_total
        forks = root.fork(32)
        with pytest.raises(OutOfBlocks) as caught:
            engine.generate(forks, max_tokens=200)
        assert caught.value.needed > total
        assert engine.stats().blocks_used == 0
        done = engine.generate(forks, max_tokens=16, ignore_eos=True)
        assert {out.finish_reason for out in done} == {"length"}
        assert len({out.token_ids for out in done}) == 1
        assert engine.stats().blocks_peak <= total
        engine.check_integrity()
