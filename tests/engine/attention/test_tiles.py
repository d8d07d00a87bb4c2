"""How plans are cut: which rows share a tile, which keys are read once and which are copied for each row."""

from __future__ import annotations

from dendrite.engine.attention.tiles import CHUNK_ROWS, MAX_SCORES, Tile, tiles
from dendrite.engine.batch import Plan, Segment


def segment(first_slot: int, num_keys: int, row_start: int, row_end: int, *, causal_rows: int = 0) -> Segment:
    return Segment(((first_slot, first_slot + num_keys),), num_keys, row_start, row_end, causal_rows)


def covered(tile: Tile, row: int) -> list[int]:
    """The slots that a row reads in either form, sorted."""
    runs = [run for run in (*tile.runs, *tile.gathered) if run.row_start <= row < run.row_end]
    paths = [[slot for first, last in run.spans for slot in range(first, last)][: run.visible(row)] for run in runs]
    return sorted(slot for path in paths for slot in path)


def test_a_trunk_is_read_once_and_leaves_are_copied() -> None:
    """Sampling from one long prompt: one product for the prompt, one for all the leaves."""
    leaves = [segment(10_000 + 100 * row, 20, row, row + 1) for row in range(16)]
    (tile,) = tiles(Plan(16, (segment(0, 2000, 0, 16), *leaves)), num_heads=8)
    assert [run.num_keys for run in tile.runs] == [2000]
    assert len(tile.gathered) == 16
    assert covered(tile, 3) == [*range(2000), *range(10_300, 10_320)]


def test_one_path_is_one_run() -> None:
    """However many segments a lone row's path has, it is read in one product."""
    path = tuple(segment(50 * index, 3, 0, 1) for index in range(200))
    (tile,) = tiles(Plan(1, path), num_heads=8)
    assert [run.num_keys for run in tile.runs] == [600]
    assert not tile.gathered


def test_adjacent_spans_become_one() -> None:
    """Segments that follow each other in the pool are read as one view."""
    (tile,) = tiles(Plan(1, (segment(0, 8, 0, 1), segment(8, 5, 0, 1))), num_heads=1)
    assert tile.runs[0].spans == ((0, 13),)


def test_siblings_share_columns() -> None:
    """Trunks of different rows lie in the same columns of the score matrix, below the one they share."""
    plan = Plan(64, (segment(0, 900, 0, 64), segment(1000, 700, 0, 32), segment(2000, 800, 32, 64)))
    (tile,) = tiles(plan, num_heads=1)
    assert sorted(zip(tile.columns, (run.num_keys for run in tile.runs), strict=True)) == [
        (0, 900),
        (900, 700),
        (900, 800),
    ]
    assert tile.width == 1700


def test_a_chunk_has_tiles_of_its_own() -> None:
    """A prompt's chunk does not share a tile with decoding rows beside it."""
    plan = Plan(
        CHUNK_ROWS + 2,
        (segment(0, CHUNK_ROWS, 0, CHUNK_ROWS, causal_rows=CHUNK_ROWS), segment(500, 40, CHUNK_ROWS, CHUNK_ROWS + 2)),
    )
    assert [(tile.row_start, tile.row_end) for tile in tiles(plan, num_heads=4)] == [
        (0, CHUNK_ROWS),
        (CHUNK_ROWS, CHUNK_ROWS + 2),
    ]


def test_tiles_of_a_chunk_read_what_they_need() -> None:
    """A long chunk is cut so that scores stay within their limit, and early rows read no later keys."""
    plan = Plan(512, (segment(0, 4096, 0, 512, causal_rows=512),))
    cut = tiles(plan, num_heads=16)
    assert [cut[0].row_start, *(tile.row_end for tile in cut)] == [0, *(tile.row_start for tile in cut[1:]), 512]
    for tile in cut:
        assert (tile.row_end - tile.row_start) * tile.width * 16 <= MAX_SCORES
        assert tile.width == 4096 - 512 + tile.row_end
    assert covered(cut[0], 0) == list(range(4096 - 511))


def test_no_rows_no_tiles() -> None:
    """An empty plan has nothing to cut."""
    assert tiles(Plan(0, ()), num_heads=4) == []
