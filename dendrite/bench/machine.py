"""What the figures were taken on, and whether anybody else was using it."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

BUSY = 0.15
"""Share of the processors that others may use before figures are marked."""
LISTEN_SECONDS = 1.0
GPU_PACKAGES = ("triton", "flashinfer-python")
"""What the GPU's kernels come from, where it is installed."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine and the versions that ran on it."""

    processor: str
    num_cores: int
    num_threads: int
    """Of PyTorch's parallel regions."""
    versions: dict[str, str]
    gpu: str = ""
    """The GPU that was used, with its memory; empty where none was."""

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        gpu = f"{self.gpu}; " if self.gpu else ""
        return f"{gpu}{self.processor}, {self.num_cores} cores, {self.num_threads} threads; {versions}"


def this_machine(device: str = "cpu") -> Machine:
    """The machine this runs on.

    Args:
        device: "cpu" or "cuda"; with the latter its GPU is named, and what drives it.
    """
    import torch  # noqa: PLC0415 - peers in other environments import this package without it

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = metadata.version("transformers")
    gpu = ""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        versions |= {name: version for name in GPU_PACKAGES if (version := _version(name))}
    return Machine(_processor(), os.cpu_count() or 1, torch.get_num_threads(), versions, gpu)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def others_load() -> float | None:
    """Share of the processors, 0 to 1, that is in use while this process sleeps for a second; None if unknown."""
    before = _ticks()
    time.sleep(LISTEN_SECONDS)
    after = _ticks()
    if before is None or after is None or after[1] == before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def load_note(loads: list[float | None]) -> list[str]:
    """A line for the reader if the machine was in use before or after a measurement."""
    known = [load for load in loads if load is not None]
    if not known:
        return ["whether the machine was in use by others is not known"]
    worst = max(known)
    if worst <= BUSY:
        return []
    return [f"the machine was in use by others: {worst:.0%} of its processors at worst; measure again when it is quiet"]


def _ticks() -> tuple[int, int] | None:
    """(busy, all) ticks of all processors since the start."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, first.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
