"""Work lists: every row reads its path, each key once; work is shared out evenly; what is merged is listed."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dendrite.engine.attention import worklist
from dendrite.engine.attention.line import GATHER_COST, MAX_UNEVEN, PAIR_COST, STRIP_COST, Tiling, cut_line
from dendrite.engine.attention.worklist import HEADER_FIELDS, WorkList, build
from dendrite.engine.batch import Plan, Segment
from tests.engine.attention import conformance
from tests.engine.attention.conformance import Node

TILING = Tiling(
    num_programs=6, num_kv_heads=2, tile_rows=4, block_keys=16, entry_keys=4, min_strip_blocks=2, min_share=1
)

SHAPES: dict[str, Node] = {
    "star": conformance.star(9, 300, 21),
    "balanced": conformance.balanced(3, 3, 11),
    "chain": conformance.chain(30, 3),
    "comb": conformance.comb(12, 5),
    "single tokens": conformance.balanced(4, 2, 1),
    "one key": Node(1, 1),
    "chunk of a prompt": Node(200, 30),
    "chunk above leaves": Node(64, 40, [Node(5, 1), Node(90, 70), Node(3, 3)]),
    "long leaves": Node(3, 0, [Node(length, 1) for length in (1, 170, 3, 64, 40, 2)]),
}


def reads(work: WorkList, tiling: Tiling) -> dict[tuple[int, int], list[int]]:
    """Follow the work list as the kernel does: the slots that each (row, K/V head) reads."""
    slots: dict[tuple[int, int], list[int]] = defaultdict(list)
    for item in work.line.items.tolist():
        row_start, num_rows, head, first, last, first_gather, last_gather, _ = item
        for slot, seen_by in work.strips[first:last].tolist():
            low, high = seen_by & 255, seen_by >> 8
            assert 0 <= low < high <= num_rows
            for row in range(low, high):
                slots[row_start + row, head] += range(slot, slot + tiling.block_keys)
        per_block = tiling.block_keys // tiling.entry_keys
        for place, readers in work.entries[first_gather * per_block : last_gather * per_block].tolist():
            slot, stand_ins = divmod(place, tiling.entry_keys)
            num_keys, low, high, is_causal = readers & 255, readers >> 8 & 255, readers >> 16 & 255, readers >> 24
            assert num_keys in (0, stand_ins + 1)
            for offset in range(num_keys):
                for row in range(low + is_causal * offset, high):
                    slots[row_start + row, head].append(slot + offset)
    return slots


def assert_reads_paths(plan: Plan, row_slots: list[list[int]], tiling: Tiling) -> None:
    slots = reads(build(plan, tiling), tiling)
    for row, path in enumerate(row_slots):
        for head in range(tiling.num_kv_heads):
            assert sorted(slots[row, head]) == sorted(path)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_scattered", [False, True])
def test_rows_read_their_paths(name: str, is_scattered: bool) -> None:
    """Every row reads each key of its path once and nothing else, for every head."""
    case = conformance.make_case(SHAPES[name], random.Random(name), is_scattered=is_scattered)
    assert_reads_paths(case.plan, case.row_slots, TILING)


@pytest.mark.parametrize("seed", range(30))
def test_random_trees_and_tilings(seed: int) -> None:
    """The same for any tree, tile, block and number of programs."""
    rng = random.Random(seed)
    case = conformance.make_case(
        conformance.drawn(rng), rng, block_size=rng.choice([1, 4, 8, 16]), is_scattered=rng.random() < 0.5
    )
    entry_keys = rng.choice([1, 2, 8])
    tiling = Tiling(
        num_programs=rng.choice([1, 5, 40]),
        num_kv_heads=rng.choice([1, 3]),
        tile_rows=rng.choice([1, 5, 16, 128]),
        block_keys=entry_keys * rng.choice([1, 4]),
        entry_keys=entry_keys,
        min_strip_blocks=rng.choice([1, 3]),
        min_share=rng.choice([1, 4]),
    )
    assert_reads_paths(case.plan, case.row_slots, tiling)


def fan(num_rows: int, trunk: int, leaf: int) -> Plan:
    leaves = (Segment(((i, i + leaf),), leaf, row, row + 1) for row, i in enumerate(range(10_000, 10**6, leaf)))
    return Plan(num_rows, (Segment(((0, trunk),), trunk, 0, num_rows), *(next(leaves) for _ in range(num_rows))))


def test_a_trunk_is_a_strip_and_leaves_share_blocks() -> None:
    """A shared prefix is loaded without masks; short leaves lie side by side in the gathered blocks."""
    work = build(fan(4, 64, 3), TILING)
    assert work.strips.tolist() == [[slot, 4 << 8] for slot in range(0, 64, TILING.block_keys)]
    assert len(work.entries) == 4
    assert [entry & 255 for entry in work.entries[:, 1].tolist()] == [3, 3, 3, 3]


def shares(work: WorkList) -> list[int]:
    """What each program's blocks cost."""
    items, starts = work.line.items, work.line.starts
    blocks = STRIP_COST * (items[:, 4] - items[:, 3]) + GATHER_COST * (items[:, 6] - items[:, 5])
    return [int(blocks[first:last].sum()) for first, last in pairwise(starts)]


def test_programs_share_evenly() -> None:
    """No program has more than a block more than another, wherever a pair has to be cut for that."""
    given = shares(build(fan(8, 1024, 40), TILING))
    assert len(given) == TILING.num_programs
    assert max(given) - min(given) <= 2 * GATHER_COST


def test_many_equal_pairs_are_not_cut() -> None:
    """A long prompt's tiles go to programs whole: nothing is left to merge, and shares stay nearly even."""
    prompt = Plan(200, (Segment(((0, 2200),), 2200, 0, 200, 200),))
    work = build(prompt, TILING)
    given = shares(work)
    assert work.line.num_partials == 0
    assert max(given) * len(given) <= MAX_UNEVEN * sum(given)


def test_shares_begin_where_pairs_do() -> None:
    """If that makes none much longer: no program then waits for another pair's queries and first keys."""
    work = build(fan(8, 1024, 40), replace(TILING, num_programs=13))  # 2 tiles x 2 heads, so 3 programs each
    assert np.diff(work.line.starts).max() == 1
    assert set(work.line.pairs[:, 1].tolist()) == {3}
    given = [share for share in shares(work) if share]
    assert len(given) == 12
    assert max(given) <= sum(given) / 13 + PAIR_COST + GATHER_COST


def test_shares_cross_pairs_where_they_would_come_out_uneven() -> None:
    """Three programs for two pairs: each has two thirds of one."""
    work = build(fan(4, 1024, 40), replace(TILING, num_programs=3))
    assert work.line.pairs[:, 1].tolist() == [2, 2]
    assert np.diff(work.line.starts).tolist() == [1, 2, 1]


def test_no_more_programs_than_shorten_the_longest_share() -> None:
    """Nine blocks are 5 and 4 for two programs, and no less than 3 for four: three programs leave less to merge."""
    work = build(Plan(1, (Segment(((0, 144),), 144, 0, 1),)), replace(TILING, num_programs=4, num_kv_heads=1))
    assert work.line.pairs[:, 1].tolist() == [3]


def test_little_work_takes_few_programs() -> None:
    """No program is given less than the smallest share."""
    work = build(fan(1, 64, 1), replace(TILING, num_programs=100, min_share=5))
    assert int((np.diff(work.line.starts) > 0).sum()) == 2


def test_what_is_not_cut_is_not_merged() -> None:
    """A (tile, head) pair done by one program writes its output at once."""
    work = build(fan(1, 1, 1), replace(TILING, num_programs=1))
    assert work.line.num_partials == 0
    assert work.line.items[:, 7].tolist() == [-1, -1]
    assert work.line.pairs[:, 1].tolist() == [1, 1]


def test_pairs_list_their_partial_results() -> None:
    """Partial results are numbered from 0; each pair's are consecutive; there are at most two a program."""
    work = build(fan(8, 1024, 40), TILING)
    assert sorted(slot for slot in work.line.items[:, 7].tolist() if slot >= 0) == list(range(work.line.num_partials))
    assert work.line.num_partials <= 2 * TILING.num_programs
    pairs = work.line.row_tiles[work.line.items[:, 0]] * TILING.num_kv_heads + work.line.items[:, 2]
    for pair, (first, count, row_start, _) in enumerate(work.line.pairs.tolist()):
        of_pair = work.line.items[pairs == pair]
        assert len(of_pair) == count
        assert set(of_pair[:, 0].tolist()) == {row_start}
        if count > 1:
            assert of_pair[:, 7].tolist() == list(range(first, first + count))


def test_tiles_are_cut_between_subtrees() -> None:
    """Where there is a choice, a tile ends where few keys are read on both sides."""
    halves = (Segment(((0, 500),), 500, 0, 5), Segment(((500, 1000),), 500, 5, 9))
    plan = Plan(9, (*halves, *(Segment(((2000 + row, 2001 + row),), 1, row, row + 1) for row in range(9))))
    work = build(plan, replace(TILING, num_kv_heads=1, tile_rows=6))
    assert work.line.pairs[:, 2].tolist() == [0, 5]
    assert np.bincount(work.line.row_tiles).tolist() == [5, 4]


def test_a_kept_line_serves_other_slots() -> None:
    """A line is cut once for all plans with as many blocks in each tile; each of them reads its own slots."""
    before = cut_line.cache_info()
    for seed, is_scattered in enumerate((False, True, False)):  # blocks in order, apart, and in order elsewhere
        case = conformance.make_case(conformance.star(9, 40, 7), random.Random(seed), is_scattered=is_scattered)
        assert_reads_paths(case.plan, case.row_slots, TILING)
    assert cut_line.cache_info().hits > before.hits
    moved = replace(
        case.plan,
        segments=tuple(
            replace(segment, spans=tuple((first + 1000, last + 1000) for first, last in segment.spans))
            for segment in case.plan.segments
        ),
    )
    assert_reads_paths(moved, [[slot + 1000 for slot in path] for path in case.row_slots], TILING)


@pytest.mark.parametrize("other", [replace(TILING, num_programs=7), replace(TILING, min_share=9)])
def test_a_kept_line_is_for_one_tiling(other: Tiling) -> None:
    """Another number of programs, or another smallest share, has a line of its own."""
    plan = fan(8, 1024, 40)
    build(plan, TILING)
    line = build(plan, other).line
    assert len(line.starts) == other.num_programs + 1
    cut_line.cache_clear()
    fresh = build(plan, other).line
    for name in ("items", "starts", "row_tiles", "pairs"):
        assert getattr(line, name).tolist() == getattr(fresh, name).tolist()


def test_a_kept_line_cannot_be_written_to() -> None:
    """Plans share its arrays."""
    line = build(fan(4, 64, 3), TILING).line
    for array in (line.items, line.starts, line.row_tiles, line.pairs, line.packed):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_packed_sections() -> None:
    """The packed form is the header and the sections it points to."""
    work = build(fan(3, 64, 5), TILING)
    packed = np.zeros(work.size, np.int32)
    work.pack(packed)
    sections = (work.line.starts, work.line.items, work.strips, work.entries, work.line.row_tiles, work.line.pairs)
    assert packed[0] == 3
    assert packed[1] == HEADER_FIELDS
    for at, section in zip(packed[1:7].tolist(), sections, strict=True):
        assert packed[at : at + section.size].tolist() == section.reshape(-1).tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_few_entries_are_listed_as_many_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop or by array operations: the same numbers."""
    plan = conformance.make_case(SHAPES[name], random.Random(name), is_scattered=True).plan
    monkeypatch.setattr(worklist, "FEW_ENTRIES", 10**9)
    by_loop = build(plan, TILING).entries
    monkeypatch.setattr(worklist, "FEW_ENTRIES", -1)
    assert by_loop.tolist() == build(plan, TILING).entries.tolist()


def test_no_rows() -> None:
    """An empty plan is no work."""
    work = build(Plan(0, ()), TILING)
    assert len(work.line.items) == 0
    assert not work.line.starts.any()
