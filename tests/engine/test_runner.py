"""The runner beside Transformers' own forward: random trees, packed in chunks, path by path, for many families."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dendrite.engine.batch import Batch, Plan, Segment
from dendrite.engine.errors import ModelError, RequestError
from dendrite.engine.ids import TRASH_BLOCK, BlockId
from dendrite.engine.kv_pool import num_blocks_for
from dendrite.engine.runner import TorchRunner
from tests.engine.packed_tree import PackedTree, make_runner, plain
from tests.models_zoo import CONTEXT_LENGTH, EXACT, tiny_config, tiny_model

TOLERANCE = 1e-4
"""In logits and hidden states of size 1 to 30, float32."""

OTHER_HEADS: dict[str, Callable[[], PreTrainedConfig]] = {
    "cohere": lambda: tiny_config("cohere"),
    "granite": lambda: tiny_config("granite", logits_scaling=3.0, residual_multiplier=0.5),
    "opt": lambda: tiny_config("opt", num_key_value_heads=4, ffn_dim=48, word_embed_proj_dim=32),
    "gpt-neox": lambda: tiny_config("gpt_neox", num_key_value_heads=4),
}
"""Families that do more than a product in their head, or hide their decoder deeper."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Operators this small only wait for each other's threads, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_exact(runner: TorchRunner, tree: PackedTree, reference: PreTrainedModel) -> None:
    for tokens, hidden in tree.paths():
        states, logits = plain(reference, tokens)
        torch.testing.assert_close(hidden, states, rtol=1e-5, atol=TOLERANCE)
        torch.testing.assert_close(runner.logits(hidden), logits, rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("family", [*EXACT, *OTHER_HEADS])
def test_families_run_exactly(family: str) -> None:
    """Every family's packed tree gives the hidden states and logits of its paths run alone."""
    config = {**EXACT, **OTHER_HEADS}[family]()
    runner = make_runner(config)
    tree = PackedTree(runner, random.Random(family))
    tree.run(23)
    assert_exact(runner, tree, tiny_model(config))


@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
@pytest.mark.parametrize("chunk_size", [1, 3, 64, 1000])
def test_chunks_and_blocks_do_not_matter(block_size: int, chunk_size: int) -> None:
    """Any chunk size over any block size gives the same states."""
    runner = make_runner(EXACT["llama"](), block_size=block_size)
    tree = PackedTree(runner, random.Random(block_size * 7 + chunk_size), depth=2)
    tree.run(chunk_size)
    assert_exact(runner, tree, tiny_model(EXACT["llama"]()))


def _row(
    token: int,
    position: int,
    slot: int,
    *,
    spans: tuple[tuple[int, int], ...],
    copies: Sequence[tuple[BlockId, BlockId]] = (),
) -> Batch:
    num_keys = sum(last - first for first, last in spans)
    plan = Plan(1, (Segment(spans, num_keys, 0, 1),))
    return Batch([token], [position], [slot], plan, list(copies), [0])


def test_copied_blocks_read_like_their_sources() -> None:
    """A copy-on-write gives the destination the source's keys in every layer before the step's own are written."""
    runner = make_runner(EXACT["llama"](), block_size=4)
    runner.run(_row(5, 0, 4, spans=((4, 5),)))
    direct = runner.run(_row(6, 1, 5, spans=((4, 6),)))
    copied = runner.run(_row(6, 1, 9, spans=((8, 10),), copies=[(BlockId(1), BlockId(2))]))
    torch.testing.assert_close(copied, direct)


def test_copies_read_before_they_write() -> None:
    """Two copies that swap blocks see each other's old content."""
    runner = make_runner(EXACT["llama"](), block_size=1)
    runner.run(_row(5, 0, 1, spans=((1, 2),)))
    runner.run(_row(9, 0, 2, spans=((2, 3),)))
    swap = [(BlockId(1), BlockId(2)), (BlockId(2), BlockId(1))]
    after = runner.run(_row(7, 1, 3, spans=((2, 4),), copies=swap))
    states, _ = plain(tiny_model(EXACT["llama"]()), [5, 7])
    torch.testing.assert_close(after[0], states[1], rtol=1e-5, atol=TOLERANCE)


def test_a_row_may_be_thrown_away() -> None:
    """A token recomputed into the trash block gives its state again and leaves what is kept as it was."""
    runner = make_runner(EXACT["llama"](), block_size=4)
    runner.run(_row(5, 0, 4, spans=((4, 5),)))
    kept = runner.run(_row(6, 1, 5, spans=((4, 6),)))
    again = runner.run(_row(6, 1, TRASH_BLOCK * 4, spans=((4, 6),)))
    torch.testing.assert_close(again, kept)


def test_no_output_rows() -> None:
    """A chunk in the middle of a prompt asks for no hidden state."""
    runner = make_runner(EXACT["llama"]())
    batch = _row(5, 0, 4, spans=((4, 5),))
    batch.output_rows.clear()
    hidden: Tensor = runner.run(batch)
    assert hidden.shape == (0, 32)


def test_a_closed_runner_keeps_no_memory() -> None:
    """The pool's memory is given back even while somebody holds the pool."""
    runner = make_runner(EXACT["llama"]())
    pool = runner._pool
    assert pool.data.numel()
    runner.close()
    assert not pool.data.numel()
    assert not pool.layers


def test_a_pool_too_small_for_a_block_is_refused() -> None:
    """Memory for less than one usable block is an error that says what a block takes."""
    spec = make_runner(EXACT["llama"]()).spec
    with pytest.raises(RequestError, match="too small"):
        num_blocks_for(spec, kv_memory=16 * spec.bytes_per_token, block_size=16)
    with pytest.raises(RequestError, match="block_size"):
        num_blocks_for(spec, kv_memory=None, block_size=0)


def test_the_default_pool_holds_a_context() -> None:
    """Without a limit there is room for at least one path of full length."""
    spec = make_runner(EXACT["llama"]()).spec
    assert num_blocks_for(spec, kv_memory=None, block_size=16) * 16 >= CONTEXT_LENGTH


def test_a_window_is_refused() -> None:
    """A layer that asks for a sliding window raises instead of attending to everything."""
    runner = make_runner(tiny_config("mistral", sliding_window=8))
    with pytest.raises(ModelError, match="sliding_window"):
        runner.run(_row(5, 0, 4, spans=((4, 5),)))
