"""A folder of prefixes that processes share: what one has computed, the next begins on.

    DIR/1f0c9a4be2d07731-6bd1….prefix      model's fingerprint, hash of the tokens; a snapshot of a branch with its K/V

Files are written beside their place and renamed, so whoever reads finds them whole; two processes that write the same
prefix write the same file. The time of a file's last change is when it was used last, and the oldest go when the folder
outgrows its size. What cannot be read is left out with a warning: it only costs computing the prefix.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dendrite.engine.errors import SnapshotError
from dendrite.engine.prefixes import common_prefix
from dendrite.engine.snapshot import Snapshot, read_snapshot, read_tokens, write_snapshot

_ENDING = ".prefix"


class PrefixFolder:
    """The prefixes of one model in one folder. Thread-safe as files are; holds no K/V itself."""

    def __init__(self, folder: Path, model: str, *, max_bytes: int) -> None:
        """Use a folder, which is made if it is missing.

        Raises:
            SnapshotError: it cannot be made.
        """
        self._folder = folder
        self._model = model
        self._max_bytes = max_bytes
        self._tokens: dict[str, list[int]] = {}  # of each file that was looked at; none for one that cannot be used
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SnapshotError(f"the folder {folder} of prefixes cannot be made: {error}") from error

    def longest(self, token_ids: Sequence[int]) -> tuple[Path | None, int]:
        """The file that shares most tokens with the beginning of a prompt, and how many."""
        best: tuple[Path | None, int] = (None, 0)
        for path in self._files():
            length = common_prefix(self._tokens_of(path) or [-1], token_ids)
            if length > best[1]:
                best = (path, length)
        return best

    def read(self, path: Path) -> Snapshot | None:
        """A file's branch; None, with a warning, if it cannot be used."""
        try:
            snapshot = read_snapshot(path, self._model)
            os.utime(path)
        except (SnapshotError, OSError) as error:
            self._leave_out(path, error)
            return None
        return snapshot

    def write(self, snapshot: Snapshot, token_ids: Sequence[int]) -> None:
        """Keeps a branch, whose K/V is its tokens'; the least recently used ones go if there is no room.

        Raises:
            SnapshotError: the file cannot be written.
        """
        digest = hashlib.sha256(repr(list(token_ids)).encode()).hexdigest()
        path = self._folder / f"{self._model[:16]}-{digest[:32]}{_ENDING}"
        write_snapshot(path, snapshot)
        self._shrink(spare=path)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._model[:16]}-*{_ENDING}"))

    def _tokens_of(self, path: Path) -> list[int]:
        if path.name not in self._tokens:
            try:
                self._tokens[path.name] = read_tokens(path, self._model)
            except SnapshotError as error:
                self._leave_out(path, error)
        return self._tokens[path.name]

    def _leave_out(self, path: Path, error: Exception) -> None:
        self._tokens[path.name] = []
        warnings.warn(f"a cached prefix is not used, and computed again: {error}", stacklevel=6)

    def _shrink(self, *, spare: Path) -> None:
        """Removes the least recently used files of any model until the folder is small enough."""
        found: list[tuple[float, int, Path]] = []
        for path in self._folder.glob(f"*{_ENDING}"):
            with suppress(OSError):  # another process has just removed it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            if path != spare:
                path.unlink(missing_ok=True)
                total -= size
