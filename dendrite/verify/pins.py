"""What a verification was made with, so that it can be made again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from dendrite.engine.checkpoint import file_sha256, weights_sha256

SEED = 1
"""Of everything that a verification samples."""


@dataclass(frozen=True, slots=True)
class Pins:
    """A model's files by hash, the libraries by version, the seed."""

    weights_sha256: str
    tokenizer_sha256: str
    """Of `tokenizer.json`; empty where the model has none."""
    transformers: str
    torch: str
    seed: int


def pins_of(folder: Path) -> Pins:
    """The pins of a model's folder on this machine."""
    tokenizer = folder / "tokenizer.json"
    return Pins(
        weights_sha256=weights_sha256(folder),
        tokenizer_sha256=file_sha256(tokenizer) if tokenizer.is_file() else "",
        transformers=transformers.__version__,
        torch=torch.__version__,
        seed=SEED,
    )
