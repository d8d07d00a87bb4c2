"""Pinned buffers before a static one, on the CPU, where a copy is done when it returns."""

from __future__ import annotations

import torch

from dendrite.engine.launching import Staging


def test_what_is_filled_arrives() -> None:
    """Both buffers in turn, up to the numbers that are sent; one keeps what it held while the other is filled."""
    static = torch.zeros((4, 40), dtype=torch.int64)
    staging = Staging(static)
    first = staging.array()
    first[:] = 7
    staging.send(static.numel())
    assert (static == 7).all()
    second = staging.array()
    second[0, :5] = 9
    staging.send(5)
    assert static[0, :5].tolist() == [9] * 5
    assert (static[2:] == 7).all()
    assert staging.array() is first
    assert (first == 7).all()
