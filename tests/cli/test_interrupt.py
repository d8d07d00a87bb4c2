"""Ctrl-C in the middle of a command: one line, exit code 130, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMMANDS = {
    "demo": ["demo", "--plain", "--model"],
    "verify": ["verify"],
    "bench": ["bench", "all", "--peer", "hf", "--output", "results", "--model"],
}
"""Each is followed by a model."""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_command_says_so_and_leaves_nothing(
    command: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The signal comes while the command works, as soon as it has said what it does."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    running = subprocess.Popen(
        [sys.executable, "-m", "dendrite", *COMMANDS[command], str(tiny_folder("llama"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert running.stderr is not None
    assert running.stderr.readline()
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert not list(temporary.iterdir())
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
