"""The bench's side of a peer: its process, started, asked and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import dendrite.bench
from dendrite.bench.peers.protocol import PeerError, TreeTask, TreeTimes

PACKAGE_ROOT = Path(next(iter(dendrite.bench.__path__))).parent.parent


class Peer:
    """A peer that has loaded its model and waits for tasks."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log
        self.version = str(self._read().get("version", ""))

    def run(self, task: TreeTask) -> TreeTimes:
        """One repetition.

        Raises:
            PeerError: the peer's process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(task)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._end() from None
        answer = self._read()
        prefill_s, fork_s, decode_s = (float(str(answer[name])) for name in ("prefill_s", "fork_s", "decode_s"))
        return TreeTimes(prefill_s, fork_s, decode_s, int(str(answer["num_decoded"])))

    def _read(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._end()
        message: dict[str, object] = json.loads(line)
        if "error" in message:
            raise PeerError(f"{self.name}: {message['error']}")
        return message

    def _end(self) -> PeerError:
        said = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = said[-1] if said else "it said nothing"
        return PeerError(f"{self.name} ended with status {self._process.wait()}: {last}")


@contextmanager
def started(name: str, module: str, arguments: Sequence[str], *, python: str = sys.executable) -> Iterator[Peer]:
    """A peer's process, ended at the end.

    Args:
        name: for people.
        module: of this package, run as a program.
        arguments: the program's.
        python: the interpreter of the environment that has the peer's engine.

    Raises:
        PeerError: the peer cannot run here.
    """
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(  # noqa: S603 - our own module
                [python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        try:
            yield Peer(name, process, log)
        finally:
            process.kill()
            process.communicate()
