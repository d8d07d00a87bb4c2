"""Top-k, top-p and min-p over a batch whose rows each have their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dendrite.engine.config import SamplingParams

HEAD = 64
"""How many of the likeliest tokens are put in order first; rows with a wider nucleus go on with 16 times as many."""
CHUNK = 64
"""Tokens that share one maximum in the search for the likeliest."""
SUM = 32_768
"""Tokens whose weights are summed at once. PyTorch would share a longer sum out among threads if there is one row, and
then the sum would depend on whether there are more."""


def keep_likely(weights: Tensor, params: Sequence[SamplingParams], scratch: Tensor) -> Tensor:
    """`weights` with zeros for what top-k, then top-p, then min-p drop.

    Args:
        weights: [num_rows, vocab] float32, a softmax.
        params: [num_rows].
        scratch: memory of the same shape, overwritten; the result lives in it.
    """
    smallest, quotas = _cuts(weights, params, scratch)
    limits = torch.from_numpy(smallest).to(weights.device)[:, None]
    kept = torch.ge(weights, limits, out=scratch).mul_(weights)  # a sixth of the time of masked_fill
    for index in np.flatnonzero(quotas):
        equals = (weights[index] == smallest[index]).nonzero()[:, 0]
        kept[index, equals[quotas[index] :]] = 0
    return kept


def _cuts(
    weights: Tensor, params: Sequence[SamplingParams], scratch: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The smallest weight that each row keeps, and how many tokens of just that weight (0 for all of them).

    Top-k, top-p and min-p each keep the first few tokens in falling order of weight, lower ids first among equals, so
    a row is cut where its shortest list ends. The order of the first `HEAD` tokens is mostly enough to find it.
    """
    vocab_size = weights.shape[1]
    top_k = np.array([min(p.top_k or vocab_size, vocab_size) for p in params])
    top_p = np.array([p.top_p for p in params])
    smallest = np.array([p.min_p for p in params], np.float32) * weights.amax(-1).cpu().numpy()
    quotas = np.zeros(len(params), np.int64)
    totals = sum(part.sum(-1).double() for part in weights.split(SUM, dim=1)).cpu().numpy()
    pending = np.flatnonzero((top_k < vocab_size) | (top_p < 1))
    width = max(HEAD, int(top_k[top_k < vocab_size].max(initial=0)) + 1)
    while len(pending):
        width = min(width, vocab_size)
        head = _largest(weights, pending, width, scratch)
        lengths = _lengths(head, top_k[pending], top_p[pending], totals[pending])
        ends = np.take_along_axis(head, lengths[:, None] - 1, 1)[:, 0]
        followers = np.take_along_axis(head, np.minimum(lengths, width - 1)[:, None], 1)[:, 0]
        found = (lengths < width) | (width == vocab_size)
        cut = found & (ends > smallest[pending])
        inside_equals = cut & (lengths < width) & (followers == ends)
        smallest[pending[cut]] = ends[cut]
        quotas[pending[inside_equals]] = (lengths - (head > ends[:, None]).sum(1))[inside_equals]
        pending = pending[~found]
        width *= 16
    return smallest, quotas


def _largest(weights: Tensor, rows: NDArray[np.int64], width: int, scratch: Tensor) -> NDArray[np.float32]:
    """The `width` largest weights of each of those rows, in falling order."""
    weights = weights.cpu()
    if width * 4 <= weights.shape[1] // CHUNK:
        candidates = _largest_chunks(weights, rows, width)
    else:
        candidates = np.take(weights.numpy(), rows, axis=0, out=scratch.cpu().numpy()[: len(rows)], mode="clip")
    rest = candidates.shape[1] - width
    if rest:
        candidates.partition(rest, axis=1)
    head = candidates[:, rest:]
    head.sort(axis=1)
    return head[:, ::-1]


def _largest_chunks(weights: Tensor, rows: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    """The `width` chunks with the largest maxima, which hold the `width` largest weights, and what no chunk holds."""
    num_rows, vocab_size = weights.shape
    num_chunks = vocab_size // CHUNK
    chunks = weights[:, : num_chunks * CHUNK].view(num_rows, num_chunks, CHUNK)
    maxima = chunks.amax(-1).numpy()[rows]
    largest = np.argpartition(maxima, num_chunks - width, axis=1)[:, num_chunks - width :]
    inside = chunks.numpy()[rows[:, None], largest].reshape(len(rows), width * CHUNK)
    return np.concatenate([inside, weights.numpy()[rows, num_chunks * CHUNK :]], axis=1)


def _lengths(
    head: NDArray[np.float32], top_k: NDArray[np.int64], top_p: NDArray[np.float64], totals: NDArray[np.float64]
) -> NDArray[np.int64]:
    """How many of the likeliest tokens top-k and then top-p keep [num_rows]; the width of `head` or more if unknown.

    Top-p keeps the token that crosses its mass, which is a share of what top-k left.
    """
    cumulative = np.cumsum(head, axis=1, dtype=np.float64)
    within = np.take_along_axis(cumulative, np.minimum(top_k, head.shape[1])[:, None] - 1, 1)[:, 0]
    mass = top_p * np.where(top_k < head.shape[1], within, totals)
    nucleus = (cumulative < mass[:, None]).sum(1) + 1
    lengths: NDArray[np.int64] = np.minimum(np.where(top_p < 1, nucleus, head.shape[1]), top_k)
    return np.minimum(lengths, head.shape[1])
