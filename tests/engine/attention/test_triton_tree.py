"""The Triton kernels against the definition of attention: on the CPU in Triton's interpreter, on a GPU compiled."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dendrite.engine.batch import Plan, Segment
from dendrite.engine.errors import ModelError
from tests.engine.attention import conformance
from tests.engine.attention.conformance import Case, Node
from tests.engine.attention.interpreter import prepare_interpreter

pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")
prepare_interpreter()

from dendrite.engine.attention import triton_tree  # noqa: E402, after the interpreter was prepared
from dendrite.engine.attention.forms import APART, SHORT, WIDE, KernelConfig, form_for, forms_for  # noqa: E402, likewise
from dendrite.engine.attention.triton_tree import TritonTreeAttention  # noqa: E402, likewise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"float32": 2e-5, "float16": 6e-3, "bfloat16": 0.04}
SMALL = KernelConfig(16, 16, num_warps=4, num_stages=2, programs_per_processor=2, use_tiles=False)
"""Small tiles and blocks, so that small trees are cut into many items."""
TILES = replace(SMALL, use_tiles=True)

SHAPES: dict[str, Node] = {
    "star": conformance.star(5, 60, 9),
    "balanced": conformance.balanced(2, 2, 11),
    "chain": conformance.chain(20, 3),
    "comb": conformance.comb(4, 5),
    "single tokens": conformance.balanced(2, 2, 1),
    "one key": Node(1, 1),
    "chunk above leaves": Node(20, 5, [Node(5, 1), Node(12, 3)]),
    "leaves of many lengths": Node(10, 0, [Node(length, 1) for length in (1, 90, 3, 40)]),
}
LARGE: dict[str, Node] = {
    "wide star": conformance.star(70, 2600, 33),
    "long leaves": conformance.star(5, 700, 900),
    "balanced": conformance.balanced(3, 4, 40),
    "deep chain": conformance.chain(120, 3),
    "deep comb": conformance.comb(40, 9),
    "whole prompt": Node(300, 300),
    "chunk of a prompt": Node(900, 130),
    "chunk above leaves": Node(64, 40, [Node(5, 1), Node(90, 70), Node(3, 3)]),
    "drawn": conformance.drawn(random.Random(7)),
}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """New tensors are full of NaNs, so that what a kernel does not write shows; one thread, see the other suite."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def assert_conforms(case: Case, config: KernelConfig | None = None) -> None:
    conformance.assert_conforms(
        lambda pool, spec: TritonTreeAttention(pool, spec, config=config), case, TOLERANCE[case.spec.dtype]
    )


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    """Trees of every typical shape, in scattered blocks, among NaNs."""
    case = conformance.make_case(SHAPES[name], random.Random(name), block_size=8, is_scattered=True, device=DEVICE)
    assert_conforms(case, SMALL)


@pytest.mark.parametrize("config", [SMALL, TILES], ids=["pointers", "tiles"])
@pytest.mark.parametrize("tree", [conformance.star(5, 150, 9), Node(140, 6)], ids=["star", "chunk"])
def test_strips(tree: Node, config: KernelConfig) -> None:
    """Long runs of adjacent slots are loaded whole, through pointers or the tensor memory accelerator."""
    assert_conforms(conformance.make_case(tree, random.Random(8), device=DEVICE), config)


@pytest.mark.parametrize("seed", range(3))
def test_random_trees(seed: int) -> None:
    """Random trees with chunks and decoding rows side by side, random block sizes."""
    rng = random.Random(seed)
    case = conformance.make_case(
        conformance.drawn(rng, depth=1), rng, block_size=rng.choice([1, 8, 16, 32]), is_scattered=True, device=DEVICE
    )
    assert_conforms(case, SMALL)


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(2, 2, 64), (9, 3, 64), (8, 2, 128), (8, 1, 64)])
def test_head_shapes(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """One to eight query heads for each K/V head, in half precision as it is configured."""
    case = conformance.make_case(
        Node(90, 1, [Node(6, 1), Node(3, 1)]),
        random.Random(head_dim),
        head_dim=head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype="float16",
        device=DEVICE,
    )
    assert_conforms(case)


def test_rows_beyond_the_plan_and_plans_in_turn() -> None:
    """A bucket's padding rows are left alone; a plan after another runs as if it were the first."""
    case = conformance.make_case(conformance.star(5, 60, 4), random.Random(1), device=DEVICE)
    backend = TritonTreeAttention(case.pool, case.spec, config=SMALL)
    backend.prepare(case.plan)
    padded = torch.cat((case.query, torch.full_like(case.query[:3], torch.nan)))
    output = backend.run(1, padded, 0.3)
    torch.testing.assert_close(output[:5].cpu().double(), conformance.expected(case, 1, 0.3), rtol=0, atol=2e-5)
    spans = tuple((slot, slot + 1) for slot in case.row_slots[4])
    one = replace(case, plan=Plan(1, (Segment(spans, len(spans), 0, 1),)), query=case.query[4:5])
    one.row_slots = [case.row_slots[4]]
    conformance.assert_conforms(lambda _pool, _spec: backend, one, 2e-5)


def test_rows_of_a_wider_tensor() -> None:
    """The query may be a slice of merged projections."""
    case = conformance.make_case(conformance.star(3, 20, 2), random.Random(2), device=DEVICE)
    backend = TritonTreeAttention(case.pool, case.spec, config=SMALL)
    backend.prepare(case.plan)
    merged = torch.cat((case.query, torch.full_like(case.query, torch.nan)), dim=1)
    output = backend.run(0, merged[:, : case.spec.num_heads], 0.3)
    torch.testing.assert_close(output.cpu().double(), conformance.expected(case, 0, 0.3), rtol=0, atol=2e-5)


def test_a_plan_beyond_the_static_buffer_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be captured, and the next small one can."""
    monkeypatch.setattr(triton_tree, "CAPACITY", 64)
    case = conformance.make_case(conformance.star(6, 40, 3), random.Random(3), device=DEVICE)
    backend = TritonTreeAttention(case.pool, case.spec, config=SMALL)
    assert not backend.can_capture(case.plan)
    conformance.assert_conforms(lambda _pool, _spec: backend, case, 2e-5)
    slot = case.row_slots[0][0]
    assert backend.can_capture(Plan(1, (Segment(((slot, slot + 1),), 1, 0, 1),)))


@pytest.mark.parametrize("head_dim, num_heads", [(80, 2), (64, 64)])
def test_what_the_kernels_are_not_made_for(head_dim: int, num_heads: int) -> None:
    """Refused when the back end is made, with the reason."""
    case = conformance.make_case(Node(1, 1), random.Random(5), device=DEVICE)
    with pytest.raises(ModelError, match="tree kernel"):
        TritonTreeAttention(case.pool, replace(case.spec, head_dim=head_dim, num_heads=num_heads, num_kv_heads=1))


@pytest.mark.parametrize(
    "rows, trunk, leaf, form",
    [
        (64, 8192, 64, WIDE),
        (8, 8192, 64, SHORT),
        (64, 16, 288, APART),
        (1, 256, 1, APART),
        (4, 8192, 64, APART),
        (300, 9, 1, WIDE),
    ],
)
def test_the_form_follows_how_much_is_shared(rows: int, trunk: int, leaf: int, form: KernelConfig) -> None:
    """Many rows over each key, few rows, rows apart or fewer than fill a tile."""
    leaves = (Segment(((row, row + leaf),), leaf, row, row + 1) for row in range(rows))
    plan = Plan(rows, (Segment(((0, trunk),), trunk, 0, rows), *leaves))
    forms = forms_for("bfloat16", 4)
    assert forms[form_for(plan, forms, 4)] is form


def test_wide_groups_and_full_precision_have_fewer_forms() -> None:
    """A tile holds a whole group at least; float32 has a form of its own."""
    assert APART not in forms_for("float16", 32)
    assert len(forms_for("float32", 4)) == 1


def test_the_kernels_compile() -> None:
    """For a GPU that need not be there: the interpreter takes what the compiler may refuse."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.engine.attention.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attend_items") == 4
    assert done.stdout.count("merge_partials") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(
    "dtype, num_heads, num_kv_heads, head_dim",
    [
        ("bfloat16", 32, 8, 128),
        ("bfloat16", 9, 3, 64),
        ("float16", 8, 1, 128),
        ("bfloat16", 4, 4, 64),
        ("float32", 9, 3, 64),
    ],
)
def test_large_trees_compiled(name: str, dtype: str, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """The kernels as they are compiled, on trees that fill the device."""
    case = conformance.make_case(
        LARGE[name],
        random.Random(name),
        dtype=dtype,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=16,
        is_scattered=True,
        device=DEVICE,
    )
    assert_conforms(case)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [WIDE, SHORT, APART], ids=["wide", "short", "apart"])
@pytest.mark.parametrize("name", LARGE)
def test_every_form_compiled(name: str, form: KernelConfig) -> None:
    """Whichever form a step would not be given computes it all the same."""
    case = conformance.make_case(
        LARGE[name],
        random.Random(name),
        dtype="bfloat16",
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        block_size=16,
        is_scattered=name < "m",
        device=DEVICE,
    )
    assert_conforms(case, form)


@pytest.mark.gpu
def test_one_graph_replays_any_tree() -> None:
    """A graph that was captured with one plan gives other plans' results after `prepare` alone."""
    first = conformance.make_case(
        conformance.star(8, 300, 9), random.Random(6), dtype="bfloat16", head_dim=64, device=DEVICE
    )
    backend = TritonTreeAttention(first.pool, first.spec, config=WIDE)
    query = torch.zeros((16, *first.query.shape[1:]), dtype=torch.bfloat16, device=DEVICE)
    backend.prepare(first.plan)
    backend.run(0, query, 0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = backend.run(0, query, 0.3)
    for case in (first, _first_rows(first, 3), _first_rows(first, 1), first):
        backend.prepare(case.plan)
        query[: len(case.query)] = case.query
        output.fill_(torch.nan)
        graph.replay()
        rows = output[: len(case.query)].cpu().double()
        torch.testing.assert_close(rows, conformance.expected(case, 0, 0.3), rtol=0, atol=0.04)


def _first_rows(case: Case, num_rows: int) -> Case:
    kept = tuple(
        replace(segment, row_end=min(segment.row_end, num_rows))
        for segment in case.plan.segments
        if segment.row_start < num_rows
    )
    return replace(case, plan=Plan(num_rows, kept), row_slots=case.row_slots[:num_rows], query=case.query[:num_rows])
