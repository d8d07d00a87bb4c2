"""The attention benchmark: its trees, its floors, and the command from end to end; no test here looks at a time."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dendrite.bench.attention import AttentionSettings, bench_attention, floor_ms
from dendrite.bench.attention_trees import BLOCK_SIZE, planned, prompts, star, trees
from dendrite.bench.floors import Rates
from dendrite.cli.main import app
from dendrite.engine.attention.page_tables import requests_of
from dendrite.engine.spec import ModelSpec


def test_every_block_of_a_tree_belongs_to_one_node() -> None:
    """Segments share no block and leave none out; the rows below a segment are one range."""
    for tree in trees((64, 200), (2, 6), 20):
        blocks = [
            block
            for segment in tree.plan.segments
            for first, last in segment.spans
            for block in range(first // BLOCK_SIZE, last // BLOCK_SIZE)
        ]
        assert sorted(blocks) == list(range(1, tree.num_blocks + 1))
        assert tree.num_keys == len(blocks) * BLOCK_SIZE
        assert sum(len(tree.row_blocks(row)) for row in range(tree.plan.num_rows)) * BLOCK_SIZE == tree.num_pairs
        assert all(0 <= segment.row_start < segment.row_end <= tree.plan.num_rows for segment in tree.plan.segments)


def test_leaves_lie_in_turns() -> None:
    """As branches do that grow side by side, after the prefix that was there before them."""
    tree = planned("two", star(32, [40, 20]))
    assert tree.row_blocks(0) == [1, 2, 3, 5, 7]
    assert tree.row_blocks(1) == [1, 2, 4, 6]
    assert tree.plan.segments[0].spans == ((16, 48),)


def test_prompts_are_chunks_behind_what_was_computed() -> None:
    """Each row reads what comes before the chunk, and the chunk up to itself."""
    alone, behind = prompts(40, (0, 100))
    assert alone.plan.num_rows == behind.plan.num_rows == 48
    assert alone.num_pairs == 48 * 49 // 2
    assert behind.num_pairs == 48 * 112 + 48 * 49 // 2
    assert behind.num_keys == behind.num_blocks * BLOCK_SIZE == 160
    assert alone.is_prompt
    assert not planned("two", star(32, [40, 20])).is_prompt
    assert [request.num_keys for request in requests_of(behind.plan, BLOCK_SIZE)] == [160]


def test_floor_is_bytes_or_products() -> None:
    """Few rows are bound by the K/V's bytes, many by their products."""
    spec = ModelSpec("heads", 1, 32, 8, 128, 4096, 1, 1 << 20, "bfloat16")
    rates = Rates(bytes_per_second=4.25e12, flops_per_second=600e12)
    few, many = planned("few", star(32768, [64] * 8)), planned("many", star(32768, [64] * 128))
    assert floor_ms(few, spec, rates) == pytest.approx(1e3 * (33280 * 4096 + 8 * 4096 * 4) / 4.25e12)
    assert floor_ms(many, spec, rates) == pytest.approx(1e3 * 4 * 4096 * 128 * 32832 / 600e12)
    assert floor_ms(few, spec, None) is None


def test_the_command_measures_every_tree(tmp_path: Path) -> None:
    """On the CPU too: one figure of the attention and one of its preparation for each tree."""
    file = tmp_path / "attention.json"
    sizes = ["--prefix", "64,96", "--branches", "2,4", "--leaf", "5", "--rounds", "2"]
    command = ["bench", "attention", "--device", "cpu", "--shape", "tiny", *sizes, "--json", str(file)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    names = [tree.name for tree in trees((64, 96), (2, 4), 5)]
    assert [(found["workload"], found["name"]) for found in figures] == [
        (name, what) for name in names for what in ("attention", "prepare, host")
    ]
    assert all(found["median"] > 0 and found["num_samples"] == 2 for found in figures)


@pytest.mark.gpu
def test_a_gpu_is_measured_in_graphs() -> None:
    """The kernels are captured and replayed, beside FlashInfer's where it is installed."""
    settings = AttentionSettings(
        "8b", "cuda", prefixes=(256,), branches=(4,), chunk=512, keys_before=(0, 64), num_rounds=2
    )
    result = bench_attention(settings, progress=lambda _: None)
    ours = [found for found in result.figures if found.engine == "dendrite" and found.name == "attention"]
    assert len(ours) == 8
    assert all(found.median > 0 for found in ours)
