"""Work folders: whose process lives keeps his, and what a killed one left is cleared away."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dendrite.engine.files import WorkFolder, remove_abandoned
from dendrite.engine.swap import SwapSpace
from tests.engine.list_mover import ListMover

SWAPPING = """
import sys
from pathlib import Path
from dendrite.engine.swap import SwapSpace
from tests.engine.list_mover import ListMover

swap = SwapSpace(ListMover([7] * 16, 4), bytes_per_token=1, host_bytes=0, disk_bytes=10**6, folder=Path(sys.argv[1]))
while True:
    swap.put([(0, 4)], 4)
    print(swap.disk_used, flush=True)
"""

unix = pytest.mark.skipif(sys.platform == "win32", reason="files cannot be locked there")


def spilled(folder: Path) -> SwapSpace:
    """A swap space that has written a file."""
    swap = SwapSpace(ListMover([7] * 16, 4), bytes_per_token=1, host_bytes=0, disk_bytes=100, folder=folder)
    swap.put([(0, 4)], 4)
    assert swap.disk_used == 4
    return swap


@unix
def test_a_kill_while_swapping_fills_no_disk(tmp_path: Path) -> None:
    """The next engine that swaps there removes what the killed one wrote, and nothing of one that still runs."""
    running = spilled(tmp_path)
    for lines in (1, 20, 300):
        process = subprocess.Popen([sys.executable, "-c", SWAPPING, tmp_path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(list(tmp_path.iterdir())) == 2  # each cleared away what the one before it had left
    second = spilled(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    running.close()
    second.close()
    assert not list(tmp_path.iterdir())


@unix
def test_only_what_was_abandoned_goes(tmp_path: Path) -> None:
    """A folder that is held, one with files and no lock, and one with another name stay."""
    held = WorkFolder(tmp_path, "work-")
    (tmp_path / "work-empty").mkdir()
    (tmp_path / "work-without").mkdir()
    (tmp_path / "work-without" / "something").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lock").touch()
    (tmp_path / "work-left").mkdir()
    (tmp_path / "work-left" / "lock").touch()
    (tmp_path / "work-left" / "deep" / "er").mkdir(parents=True)
    remove_abandoned(tmp_path, "work-")
    assert {path.name for path in tmp_path.iterdir()} == {held.path.name, "work-without", "other"}
    held.remove()
    held.remove()
    assert not held.path.exists()


@unix
def test_a_prefix_is_no_pattern(tmp_path: Path) -> None:
    """A snapshot's name may hold what means something to a shell."""
    (tmp_path / "ab-left").mkdir()
    (tmp_path / "ab-left" / "lock").touch()
    remove_abandoned(tmp_path, "[a]*")
    assert (tmp_path / "ab-left").exists()


@unix
def test_a_folder_that_was_taken_while_it_was_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes may begin at the same time, and one clear away what the other has not locked yet."""
    make = tempfile.mkdtemp
    made: list[str] = []

    def taken(**options: str) -> str:
        made.append(make(**options))
        if len(made) == 1:
            remove_abandoned(tmp_path, "work-")
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    folder = WorkFolder(tmp_path, "work-")
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == [folder.path.name]
    folder.remove()
