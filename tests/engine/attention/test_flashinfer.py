"""FlashInfer's wrappers over our pool against the definition of attention; they need a GPU and FlashInfer.

Each (dtype, head width, kernels) is compiled at its first use, for up to a minute and a half; group sizes are not. So
trees are run with one of them, and the others with one tree.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from dendrite.engine.attention.flashinfer import FlashInferAttention, Form, Kernels, why_unsupported
from dendrite.engine.attention.page_tables import row_bounds
from dendrite.engine.errors import ModelError
from tests.engine.attention import conformance
from tests.engine.attention.conformance import Case, Node
from tests.engine.attention.test_triton_tree import LARGE

pytestmark = pytest.mark.filterwarnings("default")  # FlashInfer, and what it imports, warn of what is theirs
TOLERANCE = {"float16": 6e-3, "bfloat16": 0.04}
SHAPES: dict[str, Node] = LARGE | {
    "single tokens": conformance.balanced(5, 2, 1),
    "one key": Node(1, 1),
    "leaves of many lengths": Node(10, 0, [Node(length, 1) for length in (1, 700, 3, 1, 40, 2)]),
    "chunks side by side": Node(500, 0, [Node(200, 160), Node(333, 333), Node(90, 1), Node(3, 2)]),
}
CASES: list[tuple[Form, Kernels]] = [
    ("prefill", "fa2"),
    ("prefill", "fa3"),
    ("decode", "auto"),
    ("cascade", "auto"),
]


def make_case(tree: Node, *, dtype: str = "bfloat16", head_dim: int = 128, group: int = 4, name: str = "") -> Case:
    return conformance.make_case(
        tree,
        random.Random(name),
        dtype=dtype,
        num_heads=2 * group,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=16,
        is_scattered=True,
        is_aligned=True,
        device="cuda",
    )


def assert_conforms(case: Case, form: Form, kernels: Kernels) -> None:
    if kernels == "fa3" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("FlashInfer's fa3 kernels need a Hopper GPU")
    if form == "decode" and len(row_bounds(case.plan)) <= case.plan.num_rows:
        pytest.skip("the decode form takes no chunks")
    backend = partial(FlashInferAttention, form=form, kernels=kernels)
    conformance.assert_conforms(backend, case, TOLERANCE[case.spec.dtype])


@pytest.fixture
def _flashinfer() -> None:
    if find_spec("flashinfer") is None:
        pytest.skip("needs FlashInfer, which is not installed here (pip install flashinfer-python)")


needs_flashinfer = pytest.mark.usefixtures("_flashinfer")


@pytest.mark.gpu
@needs_flashinfer
@pytest.mark.parametrize("form, kernels", CASES)
@pytest.mark.parametrize("name", SHAPES)
def test_trees(name: str, form: Form, kernels: Kernels) -> None:
    """Trees of every typical shape, in scattered blocks, among NaNs."""
    assert_conforms(make_case(SHAPES[name], name=name), form, kernels)


@pytest.mark.gpu
@needs_flashinfer
@pytest.mark.parametrize("form, kernels", CASES)
@pytest.mark.parametrize("seed", range(8))
def test_random_trees(seed: int, form: Form, kernels: Kernels) -> None:
    """Random trees with chunks and decoding rows side by side."""
    assert_conforms(make_case(conformance.drawn(random.Random(seed)), name=str(seed)), form, kernels)


@pytest.mark.gpu
@needs_flashinfer
@pytest.mark.parametrize("form, kernels", CASES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_head_shapes(dtype: str, group: int, head_dim: int, form: Form, kernels: Kernels) -> None:
    """One to eight query heads for each K/V head, both widths, both half precisions."""
    tree = conformance.star(9, 300, 21) if form == "decode" else SHAPES["chunks side by side"]
    assert_conforms(make_case(tree, dtype=dtype, head_dim=head_dim, group=group), form, kernels)


@pytest.mark.gpu
@needs_flashinfer
@pytest.mark.parametrize("form", ["prefill", "cascade"])
def test_plans_in_turn_without_waiting(form: Form) -> None:
    """Each of many plans that are made ahead of the device gives its own result, whatever scale it runs with."""
    case = make_case(conformance.star(40, 700, 30))
    backend = FlashInferAttention(case.pool, case.spec, form=form)
    cases = [case, *(_row(case, row) for row in range(12)), case]
    torch.cuda._sleep(100_000_000)  # the device is behind from here on
    outputs = []
    for each in cases:
        backend.prepare(each.plan)
        outputs.append(backend.run(1, each.query, 0.3))
    for each, output in zip(cases, outputs, strict=True):
        expected = conformance.expected(each, 1, 0.3)
        torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=0.04)


@pytest.mark.gpu
@needs_flashinfer
def test_rows_of_a_wider_tensor() -> None:
    """The query may be a slice of merged projections."""
    case = make_case(SHAPES["chunk above leaves"])
    backend = FlashInferAttention(case.pool, case.spec)
    backend.prepare(case.plan)
    merged = torch.cat((case.query, torch.full_like(case.query, torch.nan)), dim=1)
    output = backend.run(0, merged[:, : case.spec.num_heads], 0.3)
    torch.testing.assert_close(output.cpu().double(), conformance.expected(case, 0, 0.3), rtol=0, atol=0.04)


def test_what_it_is_not_made_for() -> None:
    """Refused when it is made, with the reason."""
    case = conformance.make_case(Node(1, 1), random.Random(5), dtype="bfloat16", head_dim=64)
    assert "CUDA" in str(why_unsupported(case.pool, case.spec))
    with pytest.raises(ModelError, match="CUDA device"):
        FlashInferAttention(case.pool, case.spec)


@pytest.mark.gpu
@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"head_dim": 16}])
def test_heads_it_is_not_made_for(change: dict[str, object]) -> None:
    """Full precision and narrow heads stay with the tree kernel."""
    case = make_case(Node(1, 1))
    spec = replace(case.spec, **change)  # type: ignore[arg-type] # fields by name
    assert "half precision" in str(why_unsupported(case.pool, spec))


def _row(case: Case, row: int) -> Case:
    """The tree with one of its rows alone."""
    kept = tuple(
        replace(segment, row_start=0, row_end=1)
        for segment in case.plan.segments
        if segment.row_start <= row < segment.row_end
    )
    query = case.query[row : row + 1]
    return replace(
        case, plan=replace(case.plan, num_rows=1, segments=kept), row_slots=[case.row_slots[row]], query=query
    )
