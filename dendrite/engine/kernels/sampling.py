"""Kernels that choose one token a row: the first largest, or by inverting the cumulative distribution.

    logits    [ chunk 0 | chunk 1 | ... ]      _survey    each chunk's maximum, sums of weights, first largest
                                               _cut       where top-k and top-p end (only where a row may ask for them)
                                               _sums      each chunk's weights that are left     (likewise)
                                               _choose    which chunk holds the target, and which token in it

Weights are exp((logit - largest) / temperature). Sums over a chunk are in float32, everything over chunks in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dendrite.engine.random import GOLDEN, MULTIPLIER_1, MULTIPLIER_2

_GOLDEN = tl.constexpr(GOLDEN)
_MULTIPLIER_1 = tl.constexpr(MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(MULTIPLIER_2)
_TO_UNIT = tl.constexpr(2.0**-53)


@triton.jit
def _uniform(key, position):
    """`random.uniform`, to the bit."""
    value = key.to(tl.uint64, bitcast=True) + (position.to(tl.uint64, bitcast=True) + 1) * _GOLDEN
    value = (value ^ (value >> 30)) * _MULTIPLIER_1
    value = (value ^ (value >> 27)) * _MULTIPLIER_2
    value = value ^ (value >> 31)
    return (value >> 11).to(tl.float64) * _TO_UNIT


@triton.jit
def _divisor(temperature):
    """What differences are divided by; 1 for a row whose weights nobody reads."""
    return tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def _holds_nan(values):
    return tl.max((values != values).to(tl.int32)) > 0  # noqa: PLR0124 - what NaN is


@triton.jit
def survey(logits, temperatures, peaks, raw_sums, sums, firsts, vocab, stride, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """One chunk of one row: its maximum (NaN if it holds one), both sums relative to it, its first largest token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * stride + tokens, mask=tokens < vocab, other=-float("inf")).to(tl.float32)
    peak = tl.max(values)
    spoilt = _holds_nan(values)
    distances = values - tl.where(peak == -float("inf"), 0.0, peak)
    place = row * tl.num_programs(1) + chunk
    tl.store(peaks + place, tl.where(spoilt, float("nan"), peak))
    tl.store(raw_sums + place, tl.sum(tl.exp(distances)))
    tl.store(sums + place, tl.sum(tl.exp(distances / _divisor(tl.load(temperatures + row)))))
    tl.store(firsts + place, tl.min(tl.where(values == peak, tokens, vocab)))


@triton.jit
def _at_least(logits, largest, divisor, limit, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens of a row have at least that logit, and their weight."""
    counts = tl.zeros([BLOCK], dtype=tl.int32)
    weights = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, VOCAB, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        values = tl.load(logits + tokens, mask=tokens < VOCAB, other=-float("inf")).to(tl.float32)
        taken = (values >= limit) & (tokens < VOCAB)
        counts += taken.to(tl.int32)
        weights += tl.where(taken, tl.exp((values - largest) / divisor), 0.0)
    return tl.sum(counts), tl.sum(weights.to(tl.float64))


@triton.jit
def _logit_of(rank, SHIFT: tl.constexpr):
    """The float whose place in the order of all floats (their upper bits, where SHIFT drops the lower) is `rank`."""
    bits = (rank << SHIFT).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _rank_of(logit, SHIFT: tl.constexpr):
    bits = logit.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) >> SHIFT


@triton.jit
def cut(
    logits,
    temperatures,
    top_ks,
    top_ps,
    peaks,
    largests,
    limits,
    quotas,
    stride,
    num_chunks,
    VOCAB: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: the smallest logit that top-k and then top-p keep, and how many tokens of just that logit.

    Both are prefixes of the falling order, lower ids first among equals, so the shorter one is their intersection. Its
    end is found by bisection over the floats in order, of which a bfloat16 logit can be 2**16.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    chunks = tl.arange(0, CHUNKS)
    row_peaks = tl.load(peaks + row * num_chunks + chunks, mask=chunks < num_chunks, other=-float("inf"))
    largest = tl.max(row_peaks)
    usable = (not _holds_nan(row_peaks)) & (largest > -float("inf")) & (largest < float("inf"))
    temperature = tl.load(temperatures + row)
    divisor = _divisor(temperature)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    draws = usable & (temperature > 0)
    lowest = _rank_of(tl.full([], -float("inf"), tl.float32), SHIFT)
    above = _rank_of(tl.where(usable, largest, 0.0), SHIFT) + 1

    limit = tl.full([], -float("inf"), tl.float32)
    quota = tl.zeros([], dtype=tl.int32) + VOCAB
    total = tl.zeros([], dtype=tl.float64)
    if draws & (top_k > 0) & (top_k < VOCAB):
        low, high = lowest, above
        while high - low > 1:
            middle = (low + high) >> 1
            count, _ = _at_least(logits, largest, divisor, _logit_of(middle, SHIFT), VOCAB, BLOCK)
            low, high = tl.where(count >= top_k, middle, low), tl.where(count >= top_k, high, middle)
        limit = _logit_of(low, SHIFT)
        count, total = _at_least(logits, largest, divisor, _logit_of(low + 1, SHIFT), VOCAB, BLOCK)
        quota = top_k - count
        total += quota.to(tl.float64) * tl.exp((limit - largest) / divisor).to(tl.float64)
    elif draws & (top_p < 1):
        _, total = _at_least(logits, largest, divisor, limit, VOCAB, BLOCK)
    if draws & (top_p < 1):
        mass = total * top_p
        low, high = lowest, above
        while high - low > 1:
            middle = (low + high) >> 1
            _, weight = _at_least(logits, largest, divisor, _logit_of(middle, SHIFT), VOCAB, BLOCK)
            low, high = tl.where(weight >= mass, middle, low), tl.where(weight >= mass, high, middle)
        nucleus = _logit_of(low, SHIFT)
        _, weight = _at_least(logits, largest, divisor, _logit_of(low + 1, SHIFT), VOCAB, BLOCK)
        each = tl.exp((nucleus - largest) / divisor).to(tl.float64)
        left = tl.ceil(tl.minimum((mass - weight) / each, VOCAB * 1.0))
        needed = tl.maximum(left.to(tl.int32), 1)
        quota = tl.where(nucleus > limit, needed, tl.where(nucleus == limit, tl.minimum(needed, quota), quota))
        limit = tl.maximum(limit, nucleus)
    tl.store(largests + row, largest)
    tl.store(limits + row, limit)
    tl.store(quotas + row, quota)


@triton.jit
def _kept(values, largest, divisor, limit, min_p):
    """Weights above the limit, and which tokens are at it; min-p has had its say on both."""
    weights = tl.exp((values - largest) / divisor)
    likely = (weights >= min_p) & (values > -float("inf"))
    return tl.where(likely & (values > limit), weights, 0.0), likely & (values == limit)


@triton.jit
def sum_kept(
    logits,
    temperatures,
    min_ps,
    largests,
    limits,
    sums,
    ties,
    vocab,
    stride,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One chunk of one row: the weight above the limit, and the number of tokens at it."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * stride + tokens, mask=tokens < vocab, other=-float("inf")).to(tl.float32)
    divisor = _divisor(tl.load(temperatures + row))
    weights, at_limit = _kept(values, tl.load(largests + row), divisor, tl.load(limits + row), tl.load(min_ps + row))
    place = row * tl.num_programs(1) + chunk
    tl.store(sums + place, tl.sum(weights))
    tl.store(ties + place, tl.sum(at_limit.to(tl.int32)))


@triton.jit
def _below(total):
    """The next smaller float64 of a positive one."""
    return (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)


@triton.jit
def choose(
    logits,
    keys,
    positions,
    temperatures,
    min_ps,
    peaks,
    raw_sums,
    sums,
    firsts,
    limits,
    quotas,
    ties,
    tokens_out,
    logprobs,
    normalizers,
    vocab,
    stride,
    num_chunks,
    FILTERED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: its token, -1 if its logits cannot be used."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    real = chunks < num_chunks
    places = row * num_chunks + chunks
    row_peaks = tl.load(peaks + places, mask=real, other=-float("inf"))
    largest = tl.max(row_peaks)
    usable = (not _holds_nan(row_peaks)) & (largest > -float("inf")) & (largest < float("inf"))
    distances = row_peaks - tl.where(usable, largest, 0.0)
    raw = tl.load(raw_sums + places, mask=real, other=0).to(tl.float64) * tl.exp(distances).to(tl.float64)
    normalizer = largest + tl.log(tl.sum(tl.where(real, raw, 0.0)).to(tl.float32))
    firsts_of_peaks = tl.load(firsts + places, mask=real, other=0)
    token = tl.min(tl.where(real & (row_peaks == largest), firsts_of_peaks, vocab)).to(tl.int64)

    temperature = tl.load(temperatures + row)
    divisor = _divisor(temperature)
    weights = tl.load(sums + places, mask=real, other=0).to(tl.float64)
    if FILTERED:
        limit = tl.load(limits + row)
        at_limit = tl.load(ties + places, mask=real, other=0)
        earlier = tl.cumsum(at_limit, 0) - at_limit
        allowed = tl.minimum(tl.maximum(tl.load(quotas + row) - earlier, 0), at_limit)
        each = tl.exp((limit - largest) / divisor).to(tl.float64)
        weights += tl.where(allowed > 0, allowed.to(tl.float64) * each, 0.0)
    else:
        weights *= tl.exp(distances / divisor).to(tl.float64)
    weights = tl.where(real, weights, 0.0)
    cumulative = tl.cumsum(weights, 0)
    total = tl.max(cumulative)
    fraction = _uniform(tl.load(keys + row), tl.load(positions + row))
    target = tl.minimum(fraction * total, _below(total))
    chunk = tl.minimum(tl.sum((cumulative <= target).to(tl.int32)), num_chunks - 1)
    is_chunk = chunks == chunk
    size = tl.sum(tl.where(is_chunk, weights, 0.0))
    before = tl.sum(tl.where(is_chunk, cumulative, 0.0)) - size

    inside = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * stride + inside, mask=inside < vocab, other=-float("inf")).to(tl.float32)
    if FILTERED:
        shares, is_tie = _kept(values, largest, divisor, limit, tl.load(min_ps + row))
        rank = tl.cumsum(is_tie.to(tl.int32), 0)
        quota = tl.sum(tl.where(is_chunk, allowed, 0))
        shares = tl.where(is_tie & (rank <= quota), tl.exp((values - largest) / divisor), shares)
    else:
        peak = tl.sum(tl.where(is_chunk, row_peaks, 0.0))
        shares = tl.exp((values - peak) / divisor)
    shares_so_far = tl.cumsum(shares.to(tl.float64), 0)
    whole = tl.max(shares_so_far)
    rest = tl.maximum((fraction * total - before) / size, 0.0)
    drawn = tl.sum((shares_so_far <= tl.minimum(rest * whole, _below(whole))).to(tl.int32))
    token = tl.where(temperature > 0, chunk.to(tl.int64) * CHUNK + drawn, token)

    token = tl.minimum(token, vocab - 1)
    logit = tl.load(logits + row * stride + token).to(tl.float32)
    tl.store(tokens_out + row, tl.where(usable, token, -1))
    tl.store(logprobs + row, tl.where(usable, tl.minimum(logit - normalizer, 0.0), float("nan")))
    tl.store(normalizers + row, tl.where(usable, normalizer, float("nan")))
