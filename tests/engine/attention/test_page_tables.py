"""Page tables: every row reads its path through them, in order; shared pages are listed once; nothing else is read."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from dendrite.engine.attention.page_tables import PageTable, cascade_tables, page_table, requests_of, row_bounds
from dendrite.engine.batch import Plan, Segment
from tests.engine.attention import conformance
from tests.engine.attention.conformance import Case, Node
from tests.engine.attention.paged import PagedAttention, reads

SHAPES: dict[str, Node] = {
    "star": conformance.star(9, 100, 21),
    "balanced": conformance.balanced(3, 3, 11),
    "chain": conformance.chain(60, 3),
    "comb": conformance.comb(12, 5),
    "single tokens": conformance.balanced(4, 2, 1),
    "one key": Node(1, 1),
    "whole prompt": Node(150, 150),
    "chunk of a prompt": Node(200, 30),
    "chunk above leaves": Node(64, 40, [Node(5, 1), Node(90, 70), Node(3, 3)]),
    "chunks side by side": Node(40, 0, [Node(30, 20), Node(33, 33), Node(9, 1)]),
    "leaves of many lengths": Node(10, 0, [Node(length, 1) for length in (1, 170, 3, 64, 40, 2)]),
}


def assert_reads_paths(case: Case, tables: list[PageTable]) -> None:
    """Each row's keys are those of its path, in order: levels one after the other."""
    last, size = len(tables) - 1, case.pool.block_size
    levels = [reads(table, size, causal=level == last) for level, table in enumerate(tables)]
    keys = case.pool.layers[0][0, 0, :, 0].numpy()  # a number of each slot tells it from others, copies apart
    for row, path in enumerate(case.row_slots):
        slots = np.concatenate([level[row] for level in levels])
        assert (slots % size == np.arange(len(path)) % size).all()
        assert (keys[slots] == keys[path]).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_rows_read_their_paths(name: str, block_size: int) -> None:
    """Trees of every typical shape, whole pages shared at up to so many levels."""
    case = conformance.make_case(
        SHAPES[name], random.Random(name), block_size=block_size, is_scattered=True, is_aligned=True
    )
    requests = requests_of(case.plan, block_size)
    assert_reads_paths(case, [page_table(requests, block_size)])
    for max_levels in (1, 2, 4, 99):
        tables = cascade_tables(requests, block_size, max_levels=max_levels)
        assert 1 <= len(tables) <= max_levels
        assert_reads_paths(case, tables)


@pytest.mark.parametrize("seed", range(25))
def test_random_trees(seed: int) -> None:
    """Random trees with chunks and decoding rows side by side, random block sizes and numbers of levels."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3, 8, 16])
    case = conformance.make_case(
        conformance.drawn(rng), rng, block_size=size, is_scattered=rng.random() < 0.5, is_aligned=True
    )
    requests = requests_of(case.plan, size)
    assert_reads_paths(case, [page_table(requests, size)])
    assert_reads_paths(case, cascade_tables(requests, size, max_levels=rng.choice([1, 2, 3, 9])))


@pytest.mark.parametrize("max_levels", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_attention_through_tables(seed: int, max_levels: int) -> None:
    """What is merged over levels is attention by its definition."""
    rng = random.Random(seed)
    case = conformance.make_case(conformance.drawn(rng, depth=2), rng, block_size=4, is_aligned=True)
    conformance.assert_conforms(partial(PagedAttention, max_levels=max_levels), case, 1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_tables_are_well_formed(seed: int) -> None:
    """Rows are covered by every level, pages lie back to back, and an entry without pages has a neighbour with some."""
    rng = random.Random(seed)
    case = conformance.make_case(conformance.drawn(rng), rng, block_size=4, is_aligned=True)
    tables = cascade_tables(requests_of(case.plan, 4), 4)
    for table in tables:
        assert table.qo_indptr[0] == table.kv_indptr[0] == 0
        assert table.qo_indptr[-1] == case.plan.num_rows
        assert table.kv_indptr[-1] == len(table.kv_indices)
        assert (np.diff(table.qo_indptr) > 0).all()
        num_pages = np.diff(table.kv_indptr)
        assert ((table.last_page_len > 0) == (num_pages > 0)).all()
        assert (table.last_page_len <= 4).all()
        assert all(array.dtype == np.int32 for array in (table.qo_indptr, table.kv_indices, table.last_page_len))
        assert table is tables[-1] or all(left or right for left, right in pairwise(num_pages.tolist()))
    assert (np.diff(tables[-1].kv_indptr) > 0).all()


def test_a_star_shares_its_trunk_once() -> None:
    """Two levels: the trunk's whole blocks for all rows, then each leaf with the trunk's last keys."""
    case = conformance.make_case(conformance.star(5, 30, 9), random.Random(1), block_size=8, is_aligned=True)
    shared, own = cascade_tables(requests_of(case.plan, 8), 8)
    assert shared.qo_indptr.tolist() == [0, 5]
    assert shared.kv_indices.tolist() == [1, 2, 3]
    assert shared.last_page_len.tolist() == [8]
    assert own.qo_indptr.tolist() == list(range(6))
    assert own.last_page_len.tolist() == [7] * 5


def test_a_chunk_is_one_request() -> None:
    """Rows that attend to each other are one request; decoding rows are one each, and share no key of a chunk's own."""
    chunk = Segment(((0, 8), (12, 16)), 12, 0, 5, causal_rows=3)
    leaves = (Segment(((16, 17),), 1, 3, 4), Segment(((20, 22),), 2, 4, 5))
    plan = Plan(5, (chunk, *leaves))
    assert row_bounds(plan) == [0, 3, 4, 5]
    requests = requests_of(plan, 4)
    assert [(request.num_rows, request.num_keys) for request in requests] == [(3, 12), (1, 13), (1, 14)]
    assert [request.pages.tolist() for request in requests] == [[0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 5]]
    assert [request.num_whole(4) for request in requests] == [2, 3, 3]


def test_a_deep_path_is_walked() -> None:
    """Ten thousand nodes of one token each."""
    segments = tuple(Segment(((slot, slot + 1),), 1, 0, 1) for slot in range(16, 10016))
    (request,) = requests_of(Plan(1, segments), 16)
    assert request.pages.tolist() == list(range(1, 626))
    assert request.num_keys == 10000


def test_keys_out_of_place_are_noticed() -> None:
    """A path whose keys do not lie at their positions' offsets cannot be read page by page."""
    with pytest.raises(AssertionError, match="offsets"):
        requests_of(Plan(1, (Segment(((17, 20),), 3, 0, 1),)), 16)
