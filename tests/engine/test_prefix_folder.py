"""A folder of prefixes: computed by one process, read by the next; a bad file costs a warning and the computing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from dendrite.engine.engine import Engine
from dendrite.engine.errors import RequestError, SnapshotError
from dendrite.engine.messages import Message
from dendrite.testing import scripted_engine
from tests.engine.test_pressure import reply
from tests.engine.test_snapshots import altered

SYSTEM = "You are a very careful planner who checks every single step."

ASKS = """
import sys
from pathlib import Path
import dendrite as dd

folder, cache, question = sys.argv[1:]
system = [5, 6, 7, 8] * 30
with dd.Engine.load(folder, dtype="float32", prefix_cache=cache) as engine:
    computed = engine.cache_prefix(token_ids=system)
    before = engine.stats().tokens_computed
    root = engine.root(token_ids=[*system, 40, 41, int(question)])
    out = root.generate(max_tokens=12, ignore_eos=True)
    engine.check_integrity()
    print(computed, root.num_cached, engine.stats().tokens_computed - before, *out.token_ids)
"""


def ask(folder: Path, cache: Path, question: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ASKS, str(folder), str(cache), str(question)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def answer(process: subprocess.Popen[str]) -> list[int]:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return [int(word) for word in out.split()]


def test_a_later_process_computes_only_what_comes_after(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The same tokens as without the folder; the prefix is computed once, by whichever process comes first."""
    folder = tiny_folder("llama")
    first = answer(ask(folder, tmp_path / "cache", 50))
    assert first[:3] == [120, 120, 14]
    again, other = (answer(process) for process in [ask(folder, tmp_path / "cache", number) for number in (50, 51)])
    assert again == [0, *first[1:]]
    assert other[:3] == [0, 120, 14]
    with Engine.load(str(folder), dtype="float32") as engine:
        root = engine.root(token_ids=[*[5, 6, 7, 8] * 30, 40, 41, 51])
        assert list(root.generate(max_tokens=12, ignore_eos=True).token_ids) == other[3:]


def test_processes_that_write_at_the_same_time_leave_whole_files(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Three of them, one prefix: one file, which the next one reads."""
    folder = tiny_folder("llama")
    answers = [answer(process) for process in [ask(folder, tmp_path, 50) for _ in range(3)]]
    assert len({tuple(found[1:2] + found[3:]) for found in answers}) == 1
    assert len(list(tmp_path.iterdir())) == 1
    assert answer(ask(folder, tmp_path, 50))[0] == 0


def test_roots_begin_on_the_longest_prefix_up_to_where_they_differ(tmp_path: Path) -> None:
    """Texts, conversations, a prompt that is shorter than what is there; what is in memory already is not read."""
    system: list[Message] = [{"role": "system", "content": SYSTEM}]
    with scripted_engine(reply, prefix_cache=tmp_path) as engine:
        assert engine.cache_prefix(SYSTEM) == len(SYSTEM) + 1
        assert engine.cache_prefix(SYSTEM) == 0
        assert engine.cache_prefix(SYSTEM + " Or two.") == len(" Or two.")
        assert engine.cache_prefix(messages=system) > len(SYSTEM)
        assert engine.stats().blocks_used == 0
        wanted = [
            engine.root(SYSTEM + text, seed=1).generate(max_tokens=5, temperature=1.0).text for text in ("", " Go")
        ]
    with scripted_engine(reply, prefix_cache=tmp_path, block_size=3) as engine:
        roots = [engine.root(SYSTEM + text, seed=1) for text in ("", " Go")]
        assert [root.num_cached for root in roots] == [len(SYSTEM) + 1] * 2
        assert [root.generate(max_tokens=5, temperature=1.0).text for root in roots] == wanted
        assert engine.root(SYSTEM[:30]).num_cached == 31
        chat = engine.root(messages=[*system, {"role": "user", "content": "Go"}])
        assert chat.num_cached > len(SYSTEM)
        assert engine.root("Something else").num_cached == 0
        engine.check_integrity()
        del roots, chat
        assert engine.stats().blocks_used == engine.stats().swap_memory_used == 0


def test_what_is_in_memory_alone_is_written_down(tmp_path: Path) -> None:
    """A prompt that has run before costs nothing to keep, and is kept; a second time nothing is written."""
    with scripted_engine(reply, prefix_cache=tmp_path) as engine:
        with engine.root(SYSTEM) as root:
            root.generate(max_tokens=3)
        assert engine.cache_prefix(SYSTEM) == 0
        (path,) = tmp_path.iterdir()
        written = path.stat().st_mtime_ns, path.stat().st_ino
        assert engine.cache_prefix(SYSTEM) == 0
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == written
    with scripted_engine(reply, prefix_cache=tmp_path) as engine, engine.root(SYSTEM) as root:
        assert root.num_cached == root.num_tokens


@pytest.mark.parametrize("damage", ["cut off", "a flipped bit", "newer", "gone"])
def test_a_file_that_cannot_be_used_costs_a_warning(tmp_path: Path, damage: str) -> None:
    """The prefix is computed, and written again."""
    with scripted_engine(reply, prefix_cache=tmp_path) as engine:
        engine.cache_prefix(SYSTEM)
        wanted = engine.root(SYSTEM, seed=1).generate(max_tokens=5, temperature=1.0).text
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    with scripted_engine(reply, prefix_cache=tmp_path) as engine:
        if damage == "cut off":
            path.write_bytes(data[: len(data) // 2])
        elif damage == "a flipped bit":
            path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
        elif damage == "newer":
            altered(path, dendrite_snapshot="99").replace(path)
        else:
            assert engine.core._prefixes is not None
            assert engine.core._prefixes.longest(engine.tokenizer.encode(SYSTEM, bos=True))[1] > 0
            path.unlink()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            root = engine.root(SYSTEM, seed=1)
        assert ["computed again" in str(warning.message) for warning in caught] == [True] * (damage != "gone")
        assert root.num_cached == 0
        assert root.generate(max_tokens=5, temperature=1.0).text == wanted
        root.prune()
        engine.clear_cache()
        engine.cache_prefix(SYSTEM)
    with scripted_engine(reply, prefix_cache=tmp_path) as engine:
        assert engine.root(SYSTEM).num_cached == len(SYSTEM) + 1


def test_the_least_recently_used_prefixes_go_first(tmp_path: Path) -> None:
    """When the folder is larger than it may be; the one that was just written stays."""
    with scripted_engine(reply, prefix_cache=tmp_path) as engine:
        for number in range(3):
            engine.cache_prefix(f"{number} {SYSTEM}")
            for path in tmp_path.iterdir():
                os.utime(path, (path.stat().st_mtime - 100,) * 2)
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    with scripted_engine(reply, prefix_cache=tmp_path) as engine:
        assert engine.root(f"0 {SYSTEM}").num_cached  # used just now
        assert engine.core._prefixes is not None
        engine.core._prefixes._max_bytes = 3 * size
        engine.cache_prefix(f"3 {SYSTEM}")
    with scripted_engine(reply, prefix_cache=tmp_path) as engine:
        assert [engine.root(f"{number} {SYSTEM}").num_cached > 0 for number in range(4)] == [True, False, True, True]


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    """No folder was given, or it cannot be made."""
    with scripted_engine(reply) as engine, pytest.raises(RequestError, match="prefix_cache="):
        engine.cache_prefix("text")
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="cannot be made"):
        scripted_engine(reply, prefix_cache=tmp_path / "file")
