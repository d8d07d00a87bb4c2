"""Saving and restoring: the same tokens, values and draws; whole files or none; an error for each way to be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.engine.errors import (
    BranchError,
    ContextOverflow,
    SnapshotDamaged,
    SnapshotError,
    SnapshotMismatch,
    SnapshotTooNew,
)
from dendrite.engine.messages import Message
from dendrite.engine.snapshot import _digest, _sha256
from dendrite.testing import scripted_engine


def reply(text: str) -> dict[str, float]:
    return {f" {len(text) % 7}abc": 3.0, f" {len(text) % 5}de": 2.0, " f": 1.0}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(reply) as engine:
        yield engine
        engine.check_integrity()


def draw(engine: Engine, *branches: Branch) -> list[str]:
    """What forks of the branches say next, drawn at random."""
    outs = engine.generate([branch.fork() for branch in branches], max_tokens=6, temperature=1.0)
    return [out.text for out in outs]


@pytest.mark.parametrize("kv", [True, False])
def test_a_restored_branch_goes_on_as_the_saved_one_would(engine: Engine, tmp_path: Path, *, kv: bool) -> None:
    """Tokens, value, log-probabilities and randomness; its K/V comes from the file, or is computed again."""
    branch = engine.root("the plan is", seed=3).fork()
    branch.generate(max_tokens=6, temperature=1.0)
    branch.value = 0.25
    branch.save(tmp_path / "one", kv=kv)
    wanted = [draw(engine, branch) for _ in range(3)]
    with scripted_engine(reply, block_size=7) as other:
        restored = other.restore(tmp_path / "one")
        assert other.stats().blocks_used == 0
        assert (restored.token_ids, restored.text) == (branch.token_ids, branch.text)
        assert (restored.value, restored.logprobs, restored.depth) == (0.25, branch.logprobs, 1)
        assert [draw(other, restored) for _ in range(3)] == wanted
        assert (other.stats().tokens_swapped_in > 0) == kv
        other.check_integrity()
        restored.prune()
        assert other.stats().blocks_used == other.stats().swap_memory_used == 0


def test_a_tree_comes_back_with_its_shape(engine: Engine, tmp_path: Path) -> None:
    """Parents, depths and values; the shared path is stored once and still shared."""
    root = engine.root("a long common start, said only once", seed=1)
    kids = root.fork(3)
    engine.generate(kids, max_tokens=4, temperature=1.0)
    grandchild = kids[1].fork(1, at=20)[0].append(" and then")
    for index, branch in enumerate((root, *kids, grandchild)):
        branch.value = float(index)
    root.save(tmp_path / "tree", tree=True)
    wanted = draw(engine, root, *kids, grandchild)
    with scripted_engine(reply) as other:
        branches = other.restore_tree(tmp_path / "tree")
        assert [branch.value for branch in branches] == [0, 1, 2, 3, 4]
        assert [branch.parent for branch in branches] == [None, *branches[:1] * 3, branches[2]]
        assert branches[0].children == branches[1:4]
        assert [branch.depth for branch in branches] == [0, 1, 1, 1, 2]
        assert draw(other, *branches) == wanted
        other.check_integrity()
        assert other.stats().physical_tokens < sum(branch.num_tokens for branch in branches)
        del branches
    with scripted_engine(reply) as other:
        alone = other.restore(tmp_path / "tree")
        assert alone.text == root.text
        assert other.stats().branches == 1


def test_restoring_into_the_engine_that_saved_shares_what_is_there(engine: Engine, tmp_path: Path) -> None:
    """Beside the live branch, after it, and twice: always the same tokens, and no block too many."""
    branch = engine.root("some common text and", seed=9)
    branch.generate(max_tokens=4)
    branch.save(tmp_path / "one")
    text = branch.text
    again = [engine.restore(tmp_path / "one") for _ in range(2)]
    assert [each.text for each in again] == [text, text]
    assert len({*draw(engine, *again), *draw(engine, branch)}) <= 2
    branch.append(" more")
    third = engine.restore(tmp_path / "one")
    assert third.text == text
    third.append(" else")
    assert draw(engine, third)
    engine.check_integrity()


def test_a_conversation_goes_on_after_a_restart(engine: Engine, tmp_path: Path) -> None:
    """`append(messages=)` works on the restored branch as on the saved one."""
    chat = engine.root(messages=[{"role": "user", "content": "hello"}], seed=1)
    chat.generate(max_tokens=6)
    chat.save(tmp_path / "chat")
    follow: list[Message] = [{"role": "user", "content": "go on"}]
    with scripted_engine(reply) as other:
        restored = other.restore(tmp_path / "chat")
        assert restored.append(messages=follow).token_ids == chat.append(messages=follow).token_ids


def test_a_real_model_restores_bit_for_bit(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """K/V in bfloat16 comes back as it was: the next tokens and their log-probabilities are equal."""
    folder = str(tiny_folder("llama"))
    with Engine.load(folder, dtype="bfloat16") as engine:
        branch = engine.root(token_ids=[7, 8, 9] * 20, seed=4)
        branch.generate(max_tokens=9, temperature=1.0, ignore_eos=True)
        branch.save(tmp_path / "one")
        wanted = branch.generate(max_tokens=9, temperature=1.0, ignore_eos=True)
    with Engine.load(folder, dtype="bfloat16") as engine:
        before = engine.stats().tokens_computed
        out = engine.restore(tmp_path / "one").generate(max_tokens=9, temperature=1.0, ignore_eos=True)
        assert (out.token_ids, out.logprobs) == (wanted.token_ids, wanted.logprobs)
        assert engine.stats().tokens_computed - before <= 10
    with Engine.load(folder, dtype="float32") as engine, pytest.raises(SnapshotMismatch, match="another model"):
        engine.restore(tmp_path / "one")


def altered(path: Path, **changes: str) -> Path:
    """A copy with other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path.with_name("altered"), metadata)
    return path.with_name("altered")


def test_each_way_to_be_wrong_has_its_error(engine: Engine, tmp_path: Path) -> None:
    """Cut off at any length, any flipped byte, a later version, another model, no snapshot: nothing is restored."""
    branch = engine.root("the plan is")
    branch.generate(max_tokens=4)
    good = tmp_path / "good"
    branch.save(good)
    everything = engine.stats().branches, engine.stats().blocks_used, engine.stats().swap_memory_used
    data = good.read_bytes()
    bad = tmp_path / "bad"
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:length])
        with pytest.raises(SnapshotDamaged):
            engine.restore(bad)
    for position in range(0, len(data), 37):
        bad.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(SnapshotError):
            engine.restore(bad)
    with pytest.raises(SnapshotTooNew, match="update"):
        engine.restore(altered(good, dendrite_snapshot="99"))
    with pytest.raises(SnapshotDamaged, match="manifest"):
        engine.restore(altered(good, manifest=json.dumps({"model": "scripted"})))
    save_file({"x": torch.zeros(2)}, bad)
    with pytest.raises(SnapshotDamaged, match="no snapshot"):
        engine.restore(bad)
    with pytest.raises(SnapshotError, match="cannot be read"):
        engine.restore(tmp_path / "missing")
    assert (engine.stats().branches, engine.stats().blocks_used, engine.stats().swap_memory_used) == everything
    with scripted_engine(reply, context_length=5) as small, pytest.raises(ContextOverflow):
        small.restore(good)
    assert engine.restore(good).text == branch.text


FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], object]] = {
    "no nodes": lambda manifest, tensors: manifest.pop("nodes"),
    "empty nodes": lambda manifest, tensors: manifest.update(nodes=[]),
    "no branches": lambda manifest, tensors: manifest.update(branches=[]),
    "own parent": lambda manifest, tensors: manifest["nodes"][0].update(parent=0),
    "later parent": lambda manifest, tensors: manifest["nodes"][-1].update(parent=99),
    "offset below 0": lambda manifest, tensors: manifest["nodes"][-1].update(offset=-5),
    "offset too large": lambda manifest, tensors: manifest["branches"][0].update(offset=9999),
    "unknown field": lambda manifest, tensors: manifest["branches"][0].update(colour="red"),
    "branch's parent": lambda manifest, tensors: manifest["branches"][-1].update(parent=77),
    "branch's node": lambda manifest, tensors: manifest["branches"][-1].update(node=77),
    "no tokens": lambda manifest, tensors: tensors.pop("tokens.0"),
    "unknown tokens": lambda manifest, tensors: tensors["tokens.0"].fill_(10**9),
    "shape of K/V": lambda manifest, tensors: tensors.update({"kv.0": torch.zeros(1, 2, 3)}),
    "too much K/V": lambda manifest, tensors: tensors.update({"kv.0": torch.zeros(1, 2, 1, 99, 1)}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_file_that_was_made_up_changes_nothing(engine: Engine, tmp_path: Path, name: str) -> None:
    """Its sums are right and its content is none of ours: an error, and not a branch more than before."""
    root = engine.root("the plan is")
    root.fork().generate(max_tokens=4)
    root.save(tmp_path / "good", tree=True)
    with safe_open(tmp_path / "good", framework="pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    tensors = load_file(tmp_path / "good")
    FORGERIES[name](manifest, tensors)
    written = json.dumps(manifest | {"sha256": _digest(tensors)})
    metadata = {"dendrite_snapshot": "1", "manifest": written, "manifest_sha256": _sha256(written)}
    save_file(tensors, tmp_path / "bad", metadata)
    before = engine.stats().branches, engine.stats().blocks_used, engine.stats().swap_memory_used
    with pytest.raises(SnapshotDamaged, match="was not written by this package"):
        engine.restore_tree(tmp_path / "bad")
    assert (engine.stats().branches, engine.stats().blocks_used, engine.stats().swap_memory_used) == before


def test_what_cannot_be_saved_leaves_the_old_file(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing folder, a full disk in the middle, a pruned branch: an error, and no half-made file."""
    branch = engine.root("the plan is")
    branch.save(tmp_path / "one")
    before = (tmp_path / "one").read_bytes()
    with pytest.raises(SnapshotError, match="cannot be written"):
        branch.save(tmp_path / "nowhere" / "one")

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dendrite.engine.snapshot.save_file", full)
    with pytest.raises(SnapshotError, match="No space left"):
        branch.save(tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert (tmp_path / "one").read_bytes() == before
    branch.prune()
    with pytest.raises(BranchError):
        branch.save(tmp_path / "one")


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from typing import Any
import torch
from dendrite.engine.snapshot import SavedBranch, SavedNode, Snapshot, read_snapshot, write_snapshot

def snapshot(number):
    node = SavedNode(None, 0, [number] * 50, torch.full((2, 2, 2, 50, 64), float(number)))
    return Snapshot("model", [node], [SavedBranch(None, 0, 50, 0, 1, 2, 0, [], None, None)])

path, rng = Path(sys.argv[1]) / "one", random.Random(0)
torch.set_num_threads(1)
write_snapshot(path, snapshot(0))
seen = set()
for attempt in range(100):
    ready, done = os.pipe()
    child = os.fork()
    if not child:
        for number in range(attempt * 1000, attempt * 1000 + 1000):
            write_snapshot(path, snapshot(number))
            os.write(done, b".")
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(done)
    time.sleep(rng.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = read_snapshot(path, "model")
    (node,) = found.nodes
    assert (node.kv == node.token_ids[0]).all() and len(set(node.token_ids)) == 1
    seen.add(node.token_ids[0])
write_snapshot(path, snapshot(7))
print(len(seen), len(list(path.parent.iterdir())))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")
def test_a_hundred_kills_never_cost_a_snapshot(tmp_path: Path) -> None:
    """A kill -9 at random moments of saving: what is there is whole, and what was left half-written is cleared away."""
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    different, files = map(int, done.stdout.split())
    assert different == 100
    assert files == 1
