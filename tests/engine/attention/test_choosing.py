"""Which back end runs a step: constants fitted to measurements, kept for the machine, and what they decide."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.costs import Cost, Work, fitted, paged_work, store_costs, stored_costs, tree_work
from dendrite.engine.attention.page_tables import requests_of
from dendrite.engine.batch import Plan, Segment
from dendrite.engine.errors import ModelError
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec
from tests.engine.attention.interpreter import prepare_interpreter

pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")
prepare_interpreter()

from dendrite.engine.attention import choosing  # noqa: E402, after the interpreter was prepared
from dendrite.engine.attention.triton_tree import TritonTreeAttention  # noqa: E402, likewise

ROWS = 384
FAST, SLOW = Cost(1e-5, 0, 1e-12), Cost(1e-5, 0, 5e-12)


class FakeAttention(AttentionBackend):
    """Computes nothing; remembers what it was given."""

    def __init__(
        self, pool: KVPool, spec: ModelSpec, cost: Cost, work: Callable[[Plan], Work], *, value: float
    ) -> None:
        super().__init__(pool, spec)
        self.cost, self.work, self.value = cost, work, value
        self.prepared: list[Plan] = []

    def prepare(self, plan: Plan) -> None:
        self.prepared.append(plan)

    def run(self, layer: int, query: Tensor, scale: float) -> Tensor:
        return torch.full_like(query, self.value)

    def can_capture(self, plan: Plan) -> bool:
        return self.work is tree_work


def fake_seconds(backend: AttentionBackend, plan: Plan, query: Tensor) -> float:
    assert isinstance(backend, FakeAttention)
    assert len(query) == plan.num_rows
    return backend.cost.seconds(backend.work(plan))


def make_pool(num_blocks: int = 2600) -> tuple[KVPool, ModelSpec]:
    spec = ModelSpec("small", 1, 2, 1, 4, 8, 8, 1 << 20, "bfloat16")
    return KVPool(spec, num_blocks=num_blocks, block_size=16, device=torch.device("cpu")), spec


def chunk(num_rows: int, before: int) -> Plan:
    return Plan(
        num_rows,
        (
            Segment(((16, 16 + before),), before, 0, num_rows),
            Segment(((16 + before, 16 + before + num_rows),), num_rows, 0, num_rows, num_rows),
        ),
    )


class Loads:
    """Loads one after the other on one machine, with a tree kernel and another back end that cost so much."""

    def __init__(self, folder: Path, tree: Cost, other: Cost, *, value: float = 1.0) -> None:
        self.pool, self.spec = make_pool()
        self.tree = FakeAttention(self.pool, self.spec, tree, tree_work, value=1.0)
        self.other, self.value = other, value
        self.made: list[FakeAttention] = []
        self.lines: list[str] = []
        self.num_measured = 0
        self._folder = folder

    def load(self) -> AttentionBackend:
        return choosing.chosen_from(
            self.tree, self._make, captured_rows=ROWS, folder=self._folder, say=self.lines.append, seconds=self._seconds
        )

    def _make(self) -> AttentionBackend:
        self.made.append(FakeAttention(self.pool, self.spec, self.other, paged_work, value=self.value))
        return self.made[-1]

    def _seconds(self, backend: AttentionBackend, plan: Plan, query: Tensor) -> float:
        self.num_measured += 1
        return fake_seconds(backend, plan, query)


def test_work_of_a_chunk() -> None:
    """The tree kernel multiplies what a chunk's rows read; FlashInfer a whole tile of rows."""
    plan = chunk(4, 32)
    assert tree_work(plan) == Work(36, 4 * 32 + 10)
    assert paged_work(plan) == Work(36, 128 * (36 - 1.5))


def test_work_of_branches() -> None:
    """What branches share is read once by the tree kernel, and for each of them by FlashInfer, a tile for each row."""
    leaves = tuple(Segment(((row * 16, row * 16 + 16),), 16, row, row + 1) for row in range(8))
    plan = Plan(8, (Segment(((1600, 1664),), 64, 0, 8), *leaves))
    assert tree_work(plan) == Work(64 + 8 * 16, 8 * 80)
    assert paged_work(plan) == Work(8 * 80, 8 * 80 * 128)


def test_constants_are_found_again() -> None:
    """Exact measurements give the constants that made them."""
    cost = Cost(2e-5, 3e-10, 4e-13)
    works = [paged_work(plan) for plan in choosing.probe_plans(*make_pool())]
    found = fitted(works, [cost.seconds(work) for work in works])
    assert (found.fixed, found.per_read, found.per_pair) == pytest.approx((2e-5, 3e-10, 4e-13), rel=1e-6)


def test_noise_makes_no_constant_negative() -> None:
    """A step never costs less for reading more."""
    rng = random.Random(0)
    works = [tree_work(plan) for plan in choosing.probe_plans(*make_pool())]
    for _ in range(50):
        found = fitted(works, [rng.uniform(0.5, 2) * FAST.seconds(work) for work in works])
        assert min(found.fixed, found.per_read, found.per_pair) >= 0
        assert found.seconds(works[-1]) > 0


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    """By the machine and its versions; another key, another candidate or a damaged file is measured again."""
    store_costs(tmp_path / "new", "a gpu", {"one": FAST, "two": SLOW})
    assert stored_costs(tmp_path / "new", "a gpu", ("two", "one")) == [SLOW, FAST]
    assert stored_costs(tmp_path / "new", "another gpu", ("one", "two")) is None
    assert stored_costs(tmp_path / "new", "a gpu", ("one", "three")) is None
    (file,) = (tmp_path / "new").iterdir()
    file.write_text("{", encoding="utf-8")
    assert stored_costs(tmp_path / "new", "a gpu", ("one", "two")) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Keeps nothing and fails nothing."""
    (tmp_path / "file").touch()
    store_costs(tmp_path / "file", "a gpu", {"one": FAST})
    assert stored_costs(tmp_path / "file", "a gpu", ("one",)) is None


def test_a_step_goes_where_it_costs_less(tmp_path: Path) -> None:
    """Large chunks to the one that multiplies faster; rows side by side, which it would pad, to the tree kernel."""
    loads = Loads(tmp_path, SLOW, FAST)
    attention = loads.load()
    assert isinstance(attention, choosing.ChoosingAttention)
    (other,) = loads.made
    large = chunk(2048, 2048)
    apart = Plan(600, tuple(Segment(((16, 32),), 16, row, row + 1) for row in range(600)))
    for plan, chosen in ((large, other), (apart, loads.tree), (large, other)):
        attention.prepare(plan)
        assert chosen.prepared[-1] is plan
        assert attention.can_capture(plan) is (chosen is loads.tree)


def test_a_step_that_a_graph_replays_stays_with_the_tree_kernel(tmp_path: Path) -> None:
    """Whatever the model says of it; its graphs are told from those of nobody else."""
    attention = Loads(tmp_path, SLOW, FAST).load()
    attention.prepare(chunk(ROWS, 4096))
    assert attention.can_capture(chunk(ROWS, 4096))
    captured = attention.variant
    attention.prepare(chunk(ROWS + 1, 4096))
    assert attention.variant != captured


def test_the_second_load_measures_nothing(tmp_path: Path) -> None:
    """It chooses as the first did, says nothing, and has loaded what it chose."""
    first, second = Loads(tmp_path, SLOW, FAST), Loads(tmp_path, SLOW, FAST)
    assert isinstance(first.load(), choosing.ChoosingAttention)
    assert first.num_measured > 0
    assert len(first.lines) == 1
    assert isinstance(second.load(), choosing.ChoosingAttention)
    assert second.num_measured == 0
    assert second.lines == []
    assert len(second.made[0].prepared) == 1


def test_what_never_pays_is_not_kept(tmp_path: Path) -> None:
    """The tree kernel runs alone, and later loads do not even make the other one."""
    first, second = Loads(tmp_path, FAST, SLOW), Loads(tmp_path, FAST, SLOW)
    assert first.load() is first.tree
    assert second.load() is second.tree
    assert second.made == []


def test_the_pool_is_clean_after_measuring(tmp_path: Path) -> None:
    """It held numbers to measure with, and holds zeros again."""
    loads = Loads(tmp_path, SLOW, FAST)
    loads.load()
    assert not loads.pool.data.any()


def test_another_result_is_never_chosen(tmp_path: Path) -> None:
    """Numbers that differ, NaNs included, refuse the other back end."""
    for value in (1.5, float("nan")):
        with pytest.raises(ModelError, match="not the tree kernel's"):
            Loads(tmp_path, SLOW, FAST, value=value).load()


def test_a_small_pool_measures_nothing(tmp_path: Path) -> None:
    """It never sees the steps that this is about."""
    loads = Loads(tmp_path, SLOW, FAST)
    loads.pool, loads.spec = make_pool(num_blocks=100)
    loads.tree = FakeAttention(loads.pool, loads.spec, SLOW, tree_work, value=1.0)
    assert loads.load() is loads.tree
    assert not loads.lines
    assert not loads.made


def test_probes_are_plans_of_the_engine() -> None:
    """Within the pool and the context, keys at their positions' offsets, rows as many as there are chunks of them."""
    pool, spec = make_pool()
    plans = choosing.probe_plans(pool, spec)
    for plan, (num_chunks, num_rows, before) in zip(plans, choosing.PROBES, strict=True):
        requests = requests_of(plan, pool.block_size)
        assert [(each.num_rows, each.num_keys) for each in requests] == [(num_rows, before + num_rows)] * num_chunks
        assert max(int(each.pages.max()) for each in requests) <= pool.num_blocks
    assert len(choosing.probe_plans(pool, replace(spec, context_length=4096))) == 3


def make_device_attention(folder: Path) -> AttentionBackend:
    pool, _ = make_pool(num_blocks=4)
    spec = ModelSpec("small", 1, 2, 1, 16, 8, 8, 1 << 20, "bfloat16")
    pool = KVPool(spec, num_blocks=4, block_size=16, device=torch.device("cpu"))
    return choosing.device_attention(pool, spec, captured_rows=ROWS, folder=folder, say=pytest.fail)


def test_without_flashinfer_the_tree_kernel_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, said or kept."""
    monkeypatch.setattr(choosing, "find_spec", lambda _: None)
    assert isinstance(make_device_attention(tmp_path), TritonTreeAttention)
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_costs_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told as a warning, and the tree kernel runs alone."""

    def fail(*_: object, **__: object) -> AttentionBackend:
        raise RuntimeError("Ninja build failed\nline after line")

    monkeypatch.setattr(choosing, "find_spec", lambda _: True)
    monkeypatch.setattr(choosing, "why_unsupported", lambda *_: None)
    monkeypatch.setattr(choosing, "chosen_from", fail)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with pytest.warns(UserWarning, match=r"RuntimeError: Ninja build failed$"):
        assert isinstance(make_device_attention(tmp_path), TritonTreeAttention)


def test_what_flashinfer_is_not_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not even tried: here there is no CUDA device."""
    monkeypatch.setattr(choosing, "find_spec", lambda _: True)
    monkeypatch.setattr(choosing, "chosen_from", partial(pytest.fail, "measured"))
    assert isinstance(make_device_attention(tmp_path), TritonTreeAttention)
