"""How kernels are launched, on the device at hand."""

from __future__ import annotations

from functools import cache

import torch
import triton


@cache
def _can_overlap(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one in front of it has ended (from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap(device: torch.device) -> dict[str, bool]:
    """The options of a launch in a step's chain; the kernel's `PDL` says whether it has to wait for its forerunner."""
    return {"PDL": True, "launch_pdl": True} if _can_overlap(device) else {"PDL": False}


def power_of_two(number: int) -> int:
    """The next power of two, `number` itself if it is one."""
    return triton.next_power_of_2(number)  # type: ignore[no-any-return]  # Triton is untyped
