"""The bench's side of a peer: its process, started, asked and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import dendrite.bench
from dendrite.bench.peers.protocol import Message, PeerEnded, PeerError, TreeTask, TreeTimes

PACKAGE = Path(next(iter(dendrite.bench.__path__))).parent
START_SECONDS = 480.0
"""An engine that compiles kernels for a GPU takes minutes to start."""
END_SECONDS = 10.0
"""How long a peer's own processes may take to be gone, with the device memory they hold."""
TAIL = 3
"""Last lines of a log that are quoted."""
OPENMP_DEFAULT = "300000"
"""How long GCC's OpenMP waits by itself. A peer imports this package as well, but what it sets is not for peers."""


class Peer:
    """A peer that has loaded its model and waits for questions."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log
        began = time.monotonic()
        late = threading.Timer(START_SECONDS, process.kill)
        late.start()
        try:
            self.version = str(self._read().get("version", ""))
        finally:
            late.cancel()
        self.start_seconds = time.monotonic() - began

    def ask(self, question: Message) -> Message:
        """One question and its answer.

        Raises:
            PeerEnded: the peer's process ended.
            PeerError: it cannot answer this one.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._end() from None
        return self._read()

    def run(self, task: TreeTask) -> TreeTimes:
        """One repetition; raises as `ask` does."""
        answer = self.ask(asdict(task))
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

    def _end(self) -> PeerEnded:
        said = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in said if "Error" in line]
        # What matters is often not the very last thing: engines go on to say that their helpers have ended.
        lines = [*errors[-1:], *said[-TAIL:]] if errors and errors[-1] not in said[-TAIL:] else said[-TAIL:]
        last = " | ".join(line.strip() for line in lines) or "it said nothing"
        return PeerEnded(f"{self.name} ended with status {self._process.wait()}: {last}")


@contextmanager
def started(
    name: str, module: str, arguments: Sequence[str], *, python: str = sys.executable, site: str | None = None
) -> Iterator[Peer]:
    """A peer's process, ended at the end with every process that it started.

    Args:
        name: for people.
        module: of this package, run as a program.
        arguments: the program's.
        python: the interpreter of the environment that has the peer's engine.
        site: a folder of packages that has the peer's engine, put before the interpreter's own.

    Raises:
        PeerError: the peer cannot run here.
    """
    with tempfile.TemporaryDirectory() as folder:
        # This package alone: the environment it is installed in is not to be mixed with the peer's.
        (Path(folder) / PACKAGE.name).symlink_to(PACKAGE)
        ours = os.environ.get("PYTHONPATH") if site is None and python == sys.executable else None
        path = os.pathsep.join(part for part in (site, folder, ours) if part)
        log = Path(folder) / "log.txt"
        with log.open("w", encoding="utf-8") as errors:
            try:
                process = subprocess.Popen(  # noqa: S603 - our own module
                    [python, "-m", module, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={"GOMP_SPINCOUNT": OPENMP_DEFAULT, **os.environ, "PYTHONPATH": path},
                    start_new_session=True,
                )
            except OSError as error:
                raise PeerError(f"{name}: {python} cannot be run ({error.strerror})") from error
        try:
            yield Peer(name, process, log)
        finally:
            _end_all(process)


def _end_all(process: subprocess.Popen[str]) -> None:
    """End the session that the process leads, and wait until its members are gone."""
    for _ in range(int(END_SECONDS * 10)):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            break
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
        time.sleep(0.1)
    process.communicate()
