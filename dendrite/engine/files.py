"""Files and crashes: folders of one process that others can tell from abandoned ones, and what is surely on the disk.

parent/ ── prefix-x7…/ ── lock       held as long as its process lives, however that ends
                       └─ …          a kill -9 leaves it; whoever comes next takes the lock, and clears it away
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    _CAN_LOCK = False
else:
    import fcntl

    _CAN_LOCK = True

_LOCK = "lock"
_ATTEMPTS = 3


class WorkFolder:
    """A new folder below `parent` whose name begins with `prefix`, and which is ours while we live."""

    def __init__(self, parent: Path | None, prefix: str) -> None:
        """Make it.

        Raises:
            OSError: `parent` is missing, or the disk is full.
        """
        for _ in range(_ATTEMPTS):
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock = _held(self.path)
            if self._lock is not None:
                return
            # Somebody took it for abandoned before we held it. Or there are no locks here: then the last one has to do.

    def remove(self) -> None:
        """Take it away with all that is in it. Calling again is fine."""
        _remove(self.path)
        if self._lock is not None:
            self._lock.close()


def remove_abandoned(parent: Path | None, prefix: str) -> None:
    """Takes away the work folders of processes that ended without doing so, in whatever container."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):
            if not (folder / _LOCK).exists():
                folder.rmdir()  # killed as it was made or removed, when it is empty
                continue
            with (folder / _LOCK).open("r+b") as lock:
                if _take(lock):
                    _remove(folder)


def _held(folder: Path) -> IO[bytes] | None:
    """The folder's lock, if it could be taken while the folder was there."""
    with suppress(OSError):
        lock = (folder / _LOCK).open("wb")
        if _take(lock) and (folder / _LOCK).exists():
            return lock
        lock.close()
    return None


def _remove(folder: Path) -> None:
    """Takes everything away, the lock last, so that whoever is killed meanwhile leaves it to the next one."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink(missing_ok=True)
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def sync(path: Path) -> None:
    """Make sure that a file's content, or a folder's names, are on the disk before the next step."""
    if path.is_dir() and sys.platform == "win32":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim(file: IO[bytes]) -> bool:
    """Lock the file for as long as it is open; False if somebody else, here or in another process, has locked it.

    Where there are no locks, nobody has.
    """
    return _lock(file) is not False


def _take(file: IO[bytes]) -> bool:
    """Whether the file is now locked by us; the system gives the lock back when the last copy of `file` is closed."""
    return _lock(file) is True


def _lock(file: IO[bytes]) -> bool | None:
    """Whether we have the lock now, and not somebody else; None where there are no locks."""
    if not _CAN_LOCK:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return None
    return True
