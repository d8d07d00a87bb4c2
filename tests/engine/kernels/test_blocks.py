"""Block copies on the device."""

import pytest
import torch

from dendrite.engine.ids import BlockId
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec

SPEC = ModelSpec(
    name="tiny",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    hidden_size=96,
    vocab_size=10,
    context_length=100,
    dtype="float32",
)
COPIES = [(BlockId(1), BlockId(9)), (BlockId(4), BlockId(2)), (BlockId(1), BlockId(7))]


def filled_pool(device: torch.device) -> KVPool:
    pool = KVPool(SPEC, num_blocks=10, block_size=48, device=device)
    pool.data.copy_(torch.randn(pool.data.shape))
    return pool


def copied(pool: KVPool, copies: list[tuple[BlockId, BlockId]]) -> torch.Tensor:
    """The pool's data after the copies, block by block on the CPU."""
    data = pool.data.cpu().clone()
    size = pool.block_size
    for source, destination in copies:
        data[:, :, :, destination * size : (destination + 1) * size] = pool.data[
            :, :, :, source * size : (source + 1) * size
        ].cpu()
    return data


def test_blocks_of_all_layers_are_copied_at_once(device: torch.device) -> None:
    """One launch copies them, blocks of more elements than a program takes included, and touches nothing else."""
    from dendrite.engine.kernels.blocks import copy_blocks

    pool = filled_pool(device)
    expected = copied(pool, COPIES)
    sources, destinations = torch.tensor(COPIES, device=device).T.contiguous()
    copy_blocks(pool.data, sources, destinations, pool.block_size)
    torch.testing.assert_close(pool.data.cpu(), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("copies", [COPIES, [*COPIES, (BlockId(9), BlockId(3))]], ids=["apart", "chained"])
def test_the_pool_copies_on_a_device(copies: list[tuple[BlockId, BlockId]]) -> None:
    """A block that is both source and destination is read before it is written."""
    pool = filled_pool(torch.device("cuda"))
    expected = copied(pool, copies)
    pool.copy_blocks(copies)
    torch.testing.assert_close(pool.data.cpu(), expected, rtol=0, atol=0)
