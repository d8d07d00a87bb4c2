"""Draws on the device beside the sampler of the CPU: the same tokens for the same keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dendrite.engine.config import SamplingOptions, SamplingParams
from dendrite.engine.random import child_key, root_key
from dendrite.engine.sampling import Sampler
from dendrite.engine.sampling_row import Sampled, SampleRow

OPTIONS: list[SamplingOptions] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.9, "top_k": 7},
    {"temperature": 1.5, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.01, "top_k": 3, "top_p": 0.99},
]
PLAIN = [options for options in OPTIONS if set(options) == {"temperature"}]


def rows_of(options: list[SamplingOptions], *, seed: int) -> list[SampleRow]:
    """A row each, with keys of both signs and positions of many sizes."""
    return [
        SampleRow.start(SamplingParams.of(**each), key=child_key(root_key(seed), index), position=13**index % 100_000)
        for index, each in enumerate(options)
    ]


def on_device(
    logits: Tensor, rows: list[SampleRow], device: torch.device, *, filtered: bool
) -> tuple[list[int], Tensor, Tensor]:
    from dendrite.engine.sampling_device import DrawParams, draw_tokens

    params = DrawParams.empty(len(rows) + 1, device).first(len(rows))
    params.keys.copy_(torch.tensor([row.key - (row.key >> 63 << 64) for row in rows]))
    params.positions.copy_(torch.tensor([row.position for row in rows]))
    params.temperatures.copy_(torch.tensor([row.params.temperature for row in rows]))
    params.top_ks.copy_(torch.tensor([row.params.top_k for row in rows]))
    params.top_ps.copy_(torch.tensor([row.params.top_p for row in rows]))
    params.min_ps.copy_(torch.tensor([row.params.min_p for row in rows]))
    draws = draw_tokens(logits.to(device), params, filtered=filtered)
    return draws.tokens.tolist(), draws.logprobs.cpu(), draws.normalizers.cpu()


def on_cpu(logits: Tensor, rows: list[SampleRow]) -> list[Sampled]:
    return Sampler().sample(logits, rows)


@pytest.mark.parametrize("vocab_size, dtype", [(37, torch.float32), (2048, torch.float16), (5000, torch.bfloat16)])
@pytest.mark.parametrize("filtered", [False, True])
def test_the_device_draws_what_the_cpu_draws(
    vocab_size: int, dtype: torch.dtype, filtered: bool, device: torch.device
) -> None:
    """Every mix of temperatures and filters, with many ties in half precision: equal tokens and log-probabilities."""
    options = OPTIONS if filtered else PLAIN * 3
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(len(options), vocab_size, generator=generator) * 4).round(decimals=1).to(dtype)
    rows = rows_of(options, seed=vocab_size)
    tokens, logprobs, normalizers = on_device(logits, rows, device, filtered=filtered)
    expected = on_cpu(logits, rows)
    assert tokens == [one.token_id for one in expected]
    torch.testing.assert_close(logprobs, torch.tensor([one.logprob for one in expected]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalizers, logits.float().logsumexp(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy remarks on NaN
@pytest.mark.parametrize("filtered", [False, True])
def test_rows_that_cannot_be_used_are_named(filtered: bool, device: torch.device) -> None:
    """NaN, infinity and nothing but -inf give token -1; the rows between them are drawn, forbidden tokens never."""
    logits = torch.zeros(5, 3000)
    logits[0, 2500] = math.nan
    logits[1, 7] = math.inf
    logits[2] = -math.inf
    logits[3, :2999] = -math.inf
    logits[4, 1:] = -math.inf
    rows = rows_of([{"temperature": 1.0, "top_p": 0.9 if filtered else 1.0}] * 5, seed=1)
    tokens, logprobs, normalizers = on_device(logits, rows, device, filtered=filtered)
    assert tokens == [-1, -1, -1, 2999, 0]
    assert logprobs.isnan().tolist() == [True, True, True, False, False]
    assert normalizers.isnan().tolist() == [True, True, True, False, False]
    assert logprobs[3:].tolist() == [0, 0]
