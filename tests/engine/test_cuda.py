"""The engine on a CUDA device beside the one on the CPU: same tokens, same scores, nothing leaked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from dendrite.engine.branch import Branch
from dendrite.engine.config import SamplingOptions
from dendrite.engine.engine import Engine
from dendrite.engine.errors import ModelError, RequestError
from dendrite.engine.graphs import BUCKETS, MAX_ROWS, bucket_for
from tests.models_zoo import GPT2_DIMENSIONS, family_config, save_tiny_model, tiny_config

gpu = pytest.mark.gpu
HEAD_DIM = 32
"""Narrower heads than the kernels take are the tiny models' own."""
PROMPT = [7, 19, 4, 250, 33, 8, 91, 17, 65, 2, 40]


def test_a_step_is_padded_to_the_next_number_of_rows() -> None:
    """Every size up to the largest finds a bucket that is no smaller; a larger one finds none."""
    for num_rows in range(1, MAX_ROWS + 1):
        bucket = bucket_for(num_rows)
        assert bucket is not None
        assert bucket >= num_rows
        assert not any(num_rows <= other < bucket for other in BUCKETS)
    assert bucket_for(MAX_ROWS + 1) is None


def test_a_device_that_is_not_there_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    """The error says what to use instead."""
    with pytest.raises(ModelError, match="device='cpu'"):
        Engine.load(str(tiny_folder("llama")), device="cuda:63")
    with pytest.raises(RequestError, match="device"):
        Engine.load(str(tiny_folder("llama")), device="tpu")


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A maker of folders of tiny random models whose heads the kernels take."""

    def make(family: str) -> Path:
        if family == "gpt2":
            config = family_config("gpt2", GPT2_DIMENSIONS | {"n_embd": 4 * HEAD_DIM})
        else:
            config = tiny_config(family, head_dim=HEAD_DIM, hidden_size=4 * HEAD_DIM)
        return save_tiny_model(tmp_path_factory.mktemp(family), config)

    return make


def _grow(engine: Engine, branches: list[Branch], options: SamplingOptions) -> None:
    engine.generate(branches, **options)


def _shared(ours: list[int], theirs: list[int]) -> tuple[int, ...]:
    """What both begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return tuple(token for token, _ in pairs)


def tree_of_texts(engine: Engine, sampling: SamplingOptions) -> list[list[int]]:
    """Token ids of a small search: forks, suffixes of several lengths, forks of forks, a stop, a past position."""
    root = engine.root(token_ids=PROMPT, seed=11)
    children = root.fork(5)
    for length, child in enumerate(children):
        child.append(PROMPT[: length + 1])
    _grow(engine, children, {**sampling, "max_tokens": 9, "ignore_eos": True})
    grandchildren = [grandchild for child in children for grandchild in child.fork(3)]
    _grow(engine, grandchildren, {**sampling, "max_tokens": 21, "ignore_eos": True})
    past = grandchildren[4].fork(2, at=14)
    _grow(engine, past, {**sampling, "max_tokens": 5, "stop_token_ids": [past[0].token_ids[3]]})
    found = [branch.token_ids for branch in (*children, *grandchildren, *past)]
    for branch in (*children, *grandchildren, *past, root):
        branch.prune()
    engine.check_integrity()
    assert engine.stats().blocks_used == 0
    return found


@gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2"])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.9}, {"temperature": 1.0, "top_p": 0.9, "top_k": 20}, {"presence_penalty": 0.5}],
    ids=["greedy", "sampled", "filtered", "penalised"],
)
def test_the_device_draws_the_tokens_of_the_cpu(
    wide_folder: Callable[[str], Path], family: str, sampling: SamplingOptions
) -> None:
    """float32, through graphs, looking ahead; the same uniform numbers, so the same draws."""
    folder = str(wide_folder(family))
    found = []
    for device in ("cpu", "cuda"):
        with Engine.load(folder, device=device, dtype="float32", kv_memory="4MiB", block_size=4) as engine:
            found.append(tree_of_texts(engine, sampling))
    parted = {_shared(ours, theirs) for ours, theirs in zip(*found, strict=True) if ours != theirs}
    # A draw of some four hundred may lie within rounding of the edge between two tokens, or of the nucleus.
    assert len(parted) <= ("temperature" in sampling), f"the devices part after {parted}"


@gpu
def test_scores_on_the_device_are_those_of_the_cpu(wide_folder: Callable[[str], Path]) -> None:
    """Candidates of several tokens, on a branch and on its fork at a past position."""
    folder = str(wide_folder("llama"))
    found = []
    for device in ("cpu", "cuda"):
        with Engine.load(folder, device=device, dtype="float32", kv_memory="4MiB") as engine:
            root = engine.root(token_ids=PROMPT)
            past = root.fork(1, at=5)[0]
            found.append([*root.score(["a", "b c d", "ee f"]), *past.score(["x", "y z"])])
    assert found[0] == pytest.approx(found[1], abs=2e-4)


@gpu
def test_a_pool_larger_than_the_device_is_refused(wide_folder: Callable[[str], Path]) -> None:
    """The error says how much is free."""
    with pytest.raises(RequestError, match="free"):
        Engine.load(str(wide_folder("llama")), device="cuda", kv_memory="100TB")
