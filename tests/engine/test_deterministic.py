"""`deterministic=True`: the bytes of a branch's logits, whatever else ran and however the branch came about."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from transformers import PreTrainedModel

from dendrite.engine import invariance
from dendrite.engine.attention.ordered import OrderedAttention
from dendrite.engine.branch import Branch
from dendrite.engine.config import EngineConfig
from dendrite.engine.devices import runner_and_head
from dendrite.engine.engine import Engine
from dendrite.engine.errors import ModelError, RequestError, SnapshotMismatch
from dendrite.engine.models import load_model
from dendrite.engine.passes.linear import FastLinear, can_pack
from dendrite.engine.passes.steady import GRAIN, row_pieces
from dendrite.engine.spec import ModelSpec
from tests.engine.watching import WatchingHead, watched

COMPOSITIONS = 20
"""Random batches an engine runs; ten engines of different set-ups run them for each dtype."""
SETUPS = (
    (1, 512, "1MiB"),
    (4, 64, "1MiB"),
    (4, 7, "1MiB"),
    (16, 512, "1MiB"),
    (16, 33, "1MiB"),
    (32, 3, "1MiB"),
    (8, 64, 0),
    (16, 512, 0),
    (16, 100, 0),
    (37, 128, 0),
)
"""(block size, prefill chunk, host memory for what leaves the pool); with none it is computed again."""


def opened(folder: Path, dtype: str, **settings: object) -> tuple[Engine, WatchingHead]:
    loaded = load_model(str(folder), dtype=dtype, device="cpu")
    config = EngineConfig.of(dtype=dtype, device="cpu", deterministic=True, **settings)  # type: ignore[arg-type]  # some of them
    return watched(loaded, config)


class Traffic:
    """Random forks, appends, generations, scores and prunes, with more branches than the pool holds."""

    def __init__(self, engine: Engine, seed: int, *, lengths: tuple[int, int], most: int) -> None:
        self._engine = engine
        self._rng = random.Random(seed)
        self._most = most
        self._prompt = self._tokens(*lengths)
        self.live = [self._root()]

    def step(self) -> None:
        """Change the tree in a few places, then run one random batch."""
        for _ in range(self._rng.randint(1, 4)):
            self._grow()
        rng = self._rng
        room = [each for each in self.live if each.num_tokens < self._most]
        chosen = rng.sample(room, min(len(room), rng.choice([1, 2, 5, 9])))
        other = rng.choice(self.live)
        pending = self._engine.submit_score(other, [self._tokens(1, 4), self._tokens(1, 4)])
        if chosen:
            temperature, top_p = rng.choice([(0.0, 1.0), (1.0, 1.0), (0.7, 0.9)])
            most = rng.randint(1, 6)
            self._engine.generate(chosen, max_tokens=most, ignore_eos=True, temperature=temperature, top_p=top_p)
        pending.wait()

    def _grow(self) -> None:
        rng, branch = self._rng, self._rng.choice(self.live)
        action = rng.random()
        if action < 0.5 and len(self.live) < 20:
            self.live += branch.fork(rng.randint(1, 4), at=rng.choice([None, rng.randint(1, branch.num_tokens)]))
        elif action < 0.75 and branch.num_tokens < self._most:
            branch.append(self._tokens(1, 12))
        elif action < 0.9 and len(self.live) > 2:
            self.live.remove(branch)
            branch.prune()
        else:
            self.live.append(self._root())

    def _root(self) -> Branch:
        """A root on the common prompt, cut somewhere, so that its prefix may be found in the cache."""
        return self._engine.root(token_ids=self._prompt[: self._rng.randint(1, len(self._prompt))])

    def _tokens(self, least: int, most: int) -> list[int]:
        return [self._rng.randrange(4, 300) for _ in range(self._rng.randint(least, most))]


def check_alone(head: WatchingHead, alone: Engine, alone_head: WatchingHead, *, num_paths: int) -> None:
    """Every path had one set of bytes, and some of them have the same when computed alone, from nothing."""
    assert [len(path) for path, found in head.seen.items() if len(found) > 1] == []
    for path in random.Random(0).sample(sorted(head.seen), num_paths):
        alone.clear_cache()
        with alone.root(token_ids=path) as root:
            root.score([[5]])
        assert alone_head.seen[path] == head.seen[path], len(path)


def skip_without(dtype: str) -> None:
    if not can_pack(torch.empty((1, 1), dtype=getattr(torch, dtype))):
        pytest.skip(f"this processor has no packed products of {dtype}")


@pytest.mark.parametrize("family, dtype", [("llama", "float32"), ("qwen3", "bfloat16")])
def test_company_forks_and_preemption_change_no_bit(
    tiny_folder: Callable[[str], Path], family: str, dtype: str
) -> None:
    """200 random batches, in pools so small that branches leave them, at any size of block and chunk."""
    skip_without(dtype)
    folder = tiny_folder(family)
    alone, alone_head = opened(folder, dtype, kv_memory="1MiB")
    swapped = lost = num_logits = 0
    for seed, (block_size, chunk, memory) in enumerate(SETUPS):
        engine, head = opened(
            folder,
            dtype,
            kv_memory="200KiB" if dtype == "float32" else "100KiB",
            block_size=block_size,
            prefill_chunk=chunk,
            swap_memory=memory,
        )
        with engine:
            traffic = Traffic(engine, seed, lengths=(100, 150), most=180)
            for _ in range(COMPOSITIONS):
                traffic.step()
            engine.check_integrity()
            stats = engine.stats()
        check_alone(head, alone, alone_head, num_paths=60)
        swapped, lost = swapped + stats.tokens_swapped_in, lost + stats.tokens_swap_lost
        num_logits += head.num_logits
    alone.close()
    print(f"{family} in {dtype}: {num_logits} logits, {swapped} tokens swapped in, {lost} computed again")
    assert swapped > 0
    assert lost > 0
    assert num_logits > 2000


def test_the_real_model_keeps_its_bits(real_model_folder: Path) -> None:
    """A few random batches on SmolLM2 in the dtype that this machine runs it in."""
    dtype = "bfloat16" if can_pack(torch.empty((1, 1), dtype=torch.bfloat16)) else "float32"
    engine, head = opened(real_model_folder, dtype, kv_memory="30MiB", prefill_chunk=48)
    alone, alone_head = opened(real_model_folder, dtype, kv_memory="30MiB")
    with engine, alone:
        traffic = Traffic(engine, 3, lengths=(90, 120), most=150)
        for _ in range(4):
            traffic.step()
        check_alone(head, alone, alone_head, num_paths=5)
        assert head.num_logits > len(head.seen) > 10


def test_levels_do_not_exchange_keys_and_values(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A snapshot of an ordinary engine holds other bits, and is refused."""
    folder = str(tiny_folder("llama"))
    with Engine.load(folder, dtype="float32", kv_memory="1MiB") as engine:
        engine.root(token_ids=[5, 6, 7]).save(tmp_path / "branch")
    with (
        Engine.load(folder, dtype="float32", kv_memory="1MiB", deterministic=True) as engine,
        pytest.raises(SnapshotMismatch, match="deterministic"),
    ):
        engine.restore(tmp_path / "branch")


# --- what cannot be promised is refused -------------------------------------------------------------------------------


def test_other_families_are_refused(tiny_folder: Callable[[str], Path]) -> None:
    """A family whose modules are not ours is named, with the way out."""
    with pytest.raises(RequestError, match=r"gpt2.*leave it off"):
        Engine.load(str(tiny_folder("gpt2")), deterministic=True, kv_memory="1MiB")


def test_devices_are_refused() -> None:
    """On a CUDA device the kernels do not keep an order of additions that could be promised."""
    model = cast("PreTrainedModel", SimpleNamespace(device=torch.device("cuda:0")))
    spec = ModelSpec("some-model", 1, 2, 2, 8, 16, 8, 64, "bfloat16")
    with pytest.raises(RequestError, match=r"CPU only.*device='cpu'"):
        runner_and_head(model, spec, EngineConfig.of(deterministic=True))


@pytest.mark.parametrize("num_rows", [1, 5, 140])
def test_a_machine_that_computes_rows_differently_is_refused(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    """The test at loading notices one bit in one number of rows."""
    sound = OrderedAttention.run

    def unsound(self: OrderedAttention, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        output = sound(self, layer, query, scale)
        return output if len(query) != num_rows else torch.nextafter(output, torch.full_like(output, 9.0)) + 1e-6

    monkeypatch.setattr(OrderedAttention, "run", unsound)
    monkeypatch.setattr(invariance, "CUTS", (*invariance.CUTS, (140, invariance.NUM_ROWS - 140)))
    with pytest.raises(ModelError, match="cannot be kept on this machine"):
        Engine.load(str(tiny_folder("llama")), dtype="float32", deterministic=True, kv_memory="1MiB")


def test_a_head_that_depends_on_its_rows_is_refused(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is tested as the layers are."""
    sound = FastLinear.forward

    def unsound(self: FastLinear, x: torch.Tensor) -> torch.Tensor:
        return sound(self, x) + (1e-6 if x.shape[-2] == 2 else 0)

    monkeypatch.setattr(FastLinear, "forward", unsound)
    with pytest.raises(ModelError, match="the head gave"):
        Engine.load(str(tiny_folder("llama")), dtype="float32", deterministic=True, kv_memory="1MiB")


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
@pytest.mark.parametrize("width", [48, 1536, 8192, GRAIN, GRAIN + 1])
def test_no_thread_gets_a_part_of_a_row(width: int, num_threads: int) -> None:
    """Pieces cover all rows; each runs on one thread, or its share of numbers is whole rows."""
    for num_rows in (1, 2, 3, 20, 21, 22, 23, 100, 257, 512):
        pieces = row_pieces(num_rows, width, num_threads=num_threads)
        assert sum(pieces) == num_rows
        for piece in pieces:
            numbers = piece * width
            sharing = 1 if numbers <= GRAIN else min(num_threads, -(-numbers // GRAIN))
            assert piece == 1 or -(-numbers // sharing) % width == 0
