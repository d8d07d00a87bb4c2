"""What changes a row's logits before a token is chosen: bias, penalties, and the ends that `min_tokens` forbids.

All of it is sparse: gathered, changed and scattered at the tokens in question, for every row of the batch at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dendrite.engine.config import SamplingParams
from dendrite.engine.sampling_row import SampleRow, SeenTokens


def edit(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Apply the rows' bias, then penalties, then `min_tokens`, in place; `logits` is [num_rows, vocab] float32."""
    _add_bias(logits, [(index, *row.bias) for index, row in enumerate(rows) if row.bias is not None])
    _penalise(logits, [(index, row.seen, row.params) for index, row in enumerate(rows) if row.seen is not None])
    _forbid_ends(logits, [(index, row.ends) for index, row in enumerate(rows) if row.may_not_end])


def _places(parts: Sequence[tuple[int, NDArray[np.int64]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, token) indices of several rows' token ids, flat: two of [num_places]."""
    rows = np.repeat([index for index, _ in parts], [len(token_ids) for _, token_ids in parts])
    columns = np.concatenate([token_ids for _, token_ids in parts])
    return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)


def _add_bias(logits: Tensor, parts: Sequence[tuple[int, NDArray[np.int64], NDArray[np.float32]]]) -> None:
    if parts:
        places = _places([(index, token_ids) for index, token_ids, _ in parts], logits.device)
        logits[places] += torch.from_numpy(np.concatenate([bias for *_, bias in parts])).to(logits.device)


def _penalise(logits: Tensor, parts: Sequence[tuple[int, SeenTokens, SamplingParams]]) -> None:
    if not parts:
        return
    places = _places([(index, seen.ids) for index, seen, _ in parts], logits.device)
    strengths = np.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for *_, p in parts])
    spread = np.repeat(strengths.astype(np.float32), [len(seen.ids) for _, seen, _ in parts], axis=0)
    repetition, frequency, presence = torch.from_numpy(spread).to(logits.device).unbind(1)
    counts = torch.from_numpy(np.concatenate([seen.counts for _, seen, _ in parts])).to(logits.device)
    values = logits[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[places] = values - frequency * counts - presence * (counts > 0)


def _forbid_ends(logits: Tensor, parts: Sequence[tuple[int, NDArray[np.int64]]]) -> None:
    if parts:
        logits[_places(parts, logits.device)] = -torch.inf
