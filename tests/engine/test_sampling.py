"""What the sampler draws, against exact distributions written down in plain float64."""

import math
from typing import Unpack

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dendrite.engine.config import SamplingOptions, SamplingParams
from dendrite.engine.errors import ModelError
from dendrite.engine.random import root_key, uniform
from dendrite.engine.sampling import LogitsError, Sampler, log_softmax_at
from dendrite.engine.sampling_draw import CHUNK, draw, first_largest
from dendrite.engine.sampling_filters import HEAD
from dendrite.engine.sampling_row import Sampled, SampleRow

NUM_DRAWS = 4000
INF = math.inf


def row(
    *,
    key: int = 1,
    position: int = 10,
    prompt: tuple[int, ...] = (),
    eos: int | None = None,
    **options: Unpack[SamplingOptions],
) -> SampleRow:
    ends = frozenset() if eos is None else frozenset({eos})
    return SampleRow.start(
        SamplingParams.of(**options), key=key, position=position, prompt_ids=prompt, eos_token_ids=ends
    )


def sample(logits: Tensor | list[list[float]], *rows: SampleRow) -> list[Sampled]:
    return Sampler().sample(torch.as_tensor(logits), rows)


def tokens(logits: Tensor | list[list[float]], *rows: SampleRow) -> list[int]:
    return [sampled.token_id for sampled in sample(logits, *rows)]


def noise(vocab_size: int, *, num_rows: int = 1, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def exact(logits: Tensor, params: SamplingParams) -> NDArray[np.float64]:
    """The distribution of one row [vocab], by the book: every filter over the whole sorted row."""
    scaled = logits.double().numpy() / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    if params.top_k:
        weights[order[params.top_k :]] = 0
    cumulative = np.cumsum(weights[order])
    num_kept = int(np.sum(cumulative < params.top_p * cumulative[-1])) + 1 if params.top_p < 1 else len(order)
    weights[order[num_kept:]] = 0
    weights[weights < params.min_p * weights.max()] = 0
    normalized: NDArray[np.float64] = weights / weights.sum()
    return normalized


def by_inverse_cdf(probabilities: NDArray[np.float64], fraction: float) -> int:
    return int(np.searchsorted(np.cumsum(probabilities), fraction, side="right"))


FILTERS: list[SamplingOptions] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.9, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.3, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_follow_the_exact_distribution(options: SamplingOptions) -> None:
    """Over 4,000 draws the counts are as near to the exact probabilities as chance allows, and none is impossible."""
    logits = noise(300)
    drawn = tokens(
        logits.expand(NUM_DRAWS, -1), *(row(key=root_key(9), position=at, **options) for at in range(NUM_DRAWS))
    )
    expected = exact(logits[0], SamplingParams.of(**options)) * NUM_DRAWS
    counts = np.bincount(drawn, minlength=300)
    assert not counts[expected == 0].any()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    chi_square = float(((observed - wanted) ** 2 / np.maximum(wanted, 1e-9))[wanted > 0].sum())
    freedom = max(1, int(common.sum()))
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize("vocab_size", [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17, 4 * HEAD * HEAD + 5])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_token_is_the_inverse_cdf_in_vocabulary_order(vocab_size: int, options: SamplingOptions) -> None:
    """Token for token what the textbook gives for the same uniform number, for vocabularies of any size."""
    logits = noise(vocab_size, num_rows=8, seed=vocab_size)
    rows = [row(key=root_key(index), **options) for index in range(8)]
    for index, token in enumerate(tokens(logits, *rows)):
        probabilities = exact(logits[index], rows[index].params)
        fraction = uniform(rows[index].key, rows[index].position)
        slack = 1e-5  # the sampler works in float32
        assert by_inverse_cdf(probabilities, fraction - slack) <= token
        assert token <= by_inverse_cdf(probabilities, min(fraction + slack, 1 - 1e-12))
        assert probabilities[token] > 0


def kept(logits: list[float] | Tensor, **options: Unpack[SamplingOptions]) -> set[int]:
    """Every token that 400 draws from one row of logits can give."""
    many = torch.as_tensor(logits).expand(400, -1)
    return set(tokens(many, *(row(key=root_key(3), position=at, **options) for at in range(400))))


def test_top_p_keeps_the_token_that_crosses_the_mass() -> None:
    """Of 0.5, 0.3, 0.15 and 0.05, a mass of 0.7 takes the first two, and one of 0.81 the third as well."""
    logits = [math.log(p) for p in (0.15, 0.5, 0.05, 0.3)]
    assert kept(logits, temperature=1, top_p=0.7) == {1, 3}
    assert kept(logits, temperature=1, top_p=0.81) == {0, 1, 3}
    assert kept(logits, temperature=1, top_p=0.01) == {1}


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    """0.5 and 0.3 of top-k 2 become 0.625 and 0.375, of which a mass of 0.6 is the first alone."""
    logits = [math.log(p) for p in (0.15, 0.5, 0.05, 0.3)]
    assert kept(logits, temperature=1, top_k=2, top_p=0.6) == {1}
    assert kept(logits, temperature=1, top_k=2, top_p=0.63) == {1, 3}


def test_min_p_is_a_share_of_the_likeliest_token() -> None:
    """At 0.3 of the largest probability 0.5 stays what has 0.15 or more."""
    logits = [math.log(p) for p in (0.16, 0.5, 0.04, 0.3)]
    assert kept(logits, temperature=1, min_p=0.3) == {0, 1, 3}


@pytest.mark.parametrize("width", [8, 3 * HEAD, 5 * HEAD * HEAD])
def test_among_equals_the_lowest_ids_are_kept(width: int) -> None:
    """Filters cut inside a run of equal logits exactly, also where the run is wider than the first look."""
    logits = torch.zeros(width)
    logits[5] = 1
    assert kept(logits, temperature=1, top_k=3) <= {0, 1, 5}
    assert kept(torch.zeros(width), temperature=1, top_p=3.5 / width) == {0, 1, 2, 3}


def test_a_wide_nucleus_is_cut_exactly() -> None:
    """Where the mass needs more tokens than are ordered first, the cut is still the textbook's."""
    vocab_size = 200 * HEAD
    logits = noise(vocab_size, scale=0.5)
    probabilities = exact(logits[0], SamplingParams.of(temperature=1.0, top_p=0.9))
    assert HEAD < np.count_nonzero(probabilities) < vocab_size
    drawn = kept(logits[0], temperature=1, top_p=0.9)
    assert all(probabilities[token] > 0 for token in drawn)


def test_top_k_larger_than_the_vocabulary_keeps_everything() -> None:
    """It is no error to allow more tokens than there are."""
    assert kept([0.0, 0.0, 0.0], temperature=1, top_k=1000) == {0, 1, 2}


def test_greedy_takes_the_first_of_the_largest() -> None:
    """Ties go to the lowest id, also across chunks and in the tail."""
    logits = torch.zeros(3, 2 * CHUNK + 3)
    logits[0, [7, CHUNK + 1, 2 * CHUNK + 1]] = 1
    logits[1, [CHUNK + 200, CHUNK + 201]] = 1
    logits[2, 2 * CHUNK + 2] = 1
    assert tokens(logits, row(), row(), row()) == [7, CHUNK + 200, 2 * CHUNK + 2]


@given(st.integers(1, 3 * CHUNK), st.integers(0, 100))
def test_first_largest_is_argmax(vocab_size: int, seed: int) -> None:
    """The two-level search finds what a plain one finds, in data full of ties."""
    values = noise(vocab_size, num_rows=3, seed=seed).round()
    assert first_largest(values).tolist() == [r.index(max(r)) for r in values.tolist()]


@given(st.integers(1, 3 * CHUNK), st.integers(0, 100), st.sampled_from([0.0, 0.25, 0.5, 1 - 2**-53]))
def test_no_token_of_weight_zero_is_ever_drawn(vocab_size: int, seed: int, fraction: float) -> None:
    """Not at the ends of the interval either, however few weights are left and however small they are."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(4, vocab_size, generator=generator) * (torch.rand(4, vocab_size, generator=generator) < 0.02)
    weights[:, seed % vocab_size] = 1e-30
    chosen = draw(weights, torch.full((4,), fraction, dtype=torch.float64))
    assert (weights.gather(1, chosen[:, None]) > 0).all()


def test_a_row_does_not_see_the_rest_of_the_batch() -> None:
    """Key and position decide, whatever else is drawn beside, in whatever order."""
    logits = noise(5003, num_rows=12)
    rows = [row(key=root_key(i), **FILTERS[i % len(FILTERS)]) for i in range(10)] + [row(), row(logit_bias={4: 9.0})]
    together = sample(logits, *rows)
    alone = [sample(logits[i : i + 1], rows[i])[0] for i in range(12)]
    backwards = sample(logits.flip(0), *reversed(rows))[::-1]
    assert together == alone == backwards


def test_one_sampler_serves_batches_of_any_shape() -> None:
    """The memory it keeps between calls never shows in a result."""
    sampler = Sampler()
    options: SamplingOptions = {"logit_bias": {3: 1.0}, "temperature": 0.8, "top_k": 40, "top_p": 0.9}
    for num_rows, vocab_size in [(3, 700), (9, 5003), (1, 40), (4, 700)]:
        logits = noise(vocab_size, num_rows=num_rows)
        rows = [row(key=i, **options) for i in range(num_rows)]
        assert sampler.sample(logits, rows) == sample(logits, *rows)


def test_draws_differ_by_key_and_by_position() -> None:
    """Twenty branches, or twenty positions of one, do not all say the same."""
    logits = torch.zeros(20, 1000)
    assert len(set(tokens(logits, *(row(key=root_key(i), temperature=1) for i in range(20))))) > 15
    assert len(set(tokens(logits, *(row(position=i, temperature=1) for i in range(20))))) > 15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_floating_type_is_sampled_as_its_float32_values(dtype: torch.dtype) -> None:
    """The logits come as the model makes them, and are left as they came."""
    logits = noise(900, num_rows=3).to(dtype)
    before = logits.clone()
    rows = [row(), row(temperature=1), row(temperature=0.7, top_p=0.8, logit_bias={3: 5.0})]
    assert sample(logits, *rows) == sample(logits.float(), *rows)
    assert torch.equal(logits, before)


def test_tiny_and_huge_temperatures_stay_finite() -> None:
    """1e-30 is greedy in effect, and 1e30 is uniform."""
    assert kept([100.0, 99.0, -50.0], temperature=1e-30) == {0}
    assert kept([100.0, 99.0, -50.0], temperature=1e30) == {0, 1, 2}


def test_log_probabilities_are_the_models_own() -> None:
    """Temperature, filters, penalties and bias change the choice, never the reported probability."""
    logits = noise(700, num_rows=4)
    rows = [
        row(top_logprobs=3),
        row(temperature=0.5, top_k=5, top_logprobs=1),
        row(logit_bias={123: 100.0}),
        row(prompt=(1, 2, 3), repetition_penalty=2.0, temperature=1),
    ]
    own = logits.double().log_softmax(-1)
    drawn = sample(logits, *rows)
    for index, sampled in enumerate(drawn):
        assert sampled.logprob == pytest.approx(own[index, sampled.token_id].item(), abs=1e-5)
    assert drawn[2].token_id == 123
    assert [len(sampled.top) for sampled in drawn] == [3, 1, 0, 0]
    best = own[0].topk(3)
    assert [token for token, _ in drawn[0].top] == best.indices.tolist()
    assert [logprob for _, logprob in drawn[0].top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_more_top_logprobs_than_tokens_gives_all_of_them() -> None:
    """A small vocabulary is listed whole, summing to one."""
    (sampled,) = sample([[1.0, 2.0, 3.0]], row(top_logprobs=10))
    assert sum(math.exp(logprob) for _, logprob in sampled.top) == pytest.approx(1)


def test_the_repetition_penalty_reads_prompt_and_output() -> None:
    """Positive logits are divided and negative ones multiplied, once, however often the token was there."""
    repeated = row(prompt=(0, 0, 1), repetition_penalty=2.0)
    assert tokens([[3.0, -1.0, 2.0, -1.5]], repeated) == [2]
    repeated.advance(2)
    assert tokens([[-3.0, -1.0, -0.9, -1.7]], repeated) == [3]


def test_presence_and_frequency_read_the_output_alone() -> None:
    """A token of the prompt is not held back, one said twice is held back twice by frequency and once by presence."""
    logits = [[2.0, 1.5, 1.0]]
    frequent = row(prompt=(0, 0, 0), frequency_penalty=0.4)
    present = row(prompt=(0, 0, 0), presence_penalty=0.6)
    assert tokens(logits + logits, frequent, present) == [0, 0]
    for held_back in (frequent, present):
        held_back.advance(0)
    assert tokens(logits + logits, frequent, present) == [0, 1]
    frequent.advance(0)
    assert tokens(logits, frequent) == [1]


def test_penalties_agree_with_a_plain_loop() -> None:
    """Bias, repetition, frequency and presence together, over rows with histories of different lengths."""
    vocab_size = 400
    logits = noise(vocab_size, num_rows=5)
    options: SamplingOptions = {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.9,
        "logit_bias": {7: 1.5, 9: -INF},
    }
    rows = [row(prompt=tuple(range(0, 40 * i, 3)), **options) for i in range(5)]
    expected = logits.double()
    expected[:, 7] += 1.5
    expected[:, 9] = -INF
    for index, one in enumerate(rows):
        output = [(index * 37 + 5 * step * step) % vocab_size for step in range(30)]
        for token in output:
            one.advance(token)
        for token in set(output) | set(range(0, 40 * index, 3)):
            value = expected[index, token].item()
            value = value / 1.3 if value > 0 else value * 1.3
            expected[index, token] = value - 0.7 * output.count(token) - 0.9 * (token in output)
    assert tokens(logits, *rows) == expected.argmax(-1).tolist()


def test_ends_are_forbidden_until_min_tokens_are_made() -> None:
    """The model's end and the caller's stop tokens both wait; with `ignore_eos` the model's end is any other token."""
    logits = [[5.0, 4.0, 3.0, 2.0]]
    waiting = row(min_tokens=2, eos=0, stop_token_ids=[1])
    assert tokens(logits, waiting) == [2]
    waiting.advance(2)
    assert tokens(logits, waiting) == [2]
    waiting.advance(2)
    assert tokens(logits, waiting) == [0]
    assert tokens(logits, row(min_tokens=2, eos=0, ignore_eos=True)) == [0]


@pytest.mark.parametrize("spoilt", [math.nan, INF])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_spoilt_logits_are_refused_by_row(spoilt: float, options: SamplingOptions) -> None:
    """One NaN or infinity anywhere in a row names that row; the others can be drawn without it, as if it never was."""
    logits = noise(600, num_rows=4)
    logits[1, 400] = spoilt
    logits[3, 0] = spoilt
    rows = [row(key=i, **options) for i in range(4)]
    sampler = Sampler()
    with pytest.raises(LogitsError, match="rows 1, 3") as refusal:
        sampler.sample(logits, rows)
    assert refusal.value.rows == (1, 3)
    assert isinstance(refusal.value, ModelError)
    assert sampler.sample(logits[[0, 2]], [rows[0], rows[2]]) == sample(
        logits[[0, 2]], row(key=0, **options), row(key=2, **options)
    )


def test_a_row_of_minus_infinity_is_refused() -> None:
    """Nothing is left to choose from, whether the model or the caller forbade it all."""
    with pytest.raises(LogitsError, match="row 0"):
        sample([[-INF, -INF]], row())
    with pytest.raises(LogitsError, match="row 1: logit_bias, min_tokens and"):
        sample([[0.0, 0.0]] * 2, row(), row(temperature=1, logit_bias={0: -INF, 1: -INF}))


def test_minus_infinity_is_a_fine_logit() -> None:
    """Masked tokens are never drawn; a row with one token left gives that one, surely."""
    assert kept([0.0, -INF, 0.0, -INF], temperature=1) == {0, 2}
    (sampled,) = sample([[-INF, -INF, 3.0, -INF]], row(temperature=1.5, top_p=0.9, min_p=0.1, top_logprobs=2))
    assert (sampled.token_id, sampled.logprob) == (2, 0.0)


def test_a_biased_token_outside_the_vocabulary_is_no_silent_write() -> None:
    """It never reaches the next row's logits."""
    with pytest.raises(IndexError):
        sample([[0.0, 0.0], [1.0, 0.0]], row(logit_bias={2: 5.0}), row())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_softmax_at_reads_single_tokens(dtype: torch.dtype) -> None:
    """More rows than one block, the last one not full."""
    logits = noise(1000, num_rows=37).to(dtype)
    token_ids = torch.arange(37) * 13
    expected = logits.double().log_softmax(-1)[torch.arange(37), token_ids]
    torch.testing.assert_close(log_softmax_at(logits, token_ids).double(), expected, atol=1e-5, rtol=0)
    assert log_softmax_at(logits[:0], token_ids[:0]).tolist() == []


def test_log_softmax_at_refuses_spoilt_rows() -> None:
    """By the row's index among all, not within its block; a masked token is just improbable."""
    logits = noise(50, num_rows=40)
    logits[5, 3] = -INF
    assert log_softmax_at(logits, torch.full((40,), 3))[5] == -INF
    logits[33, 7] = math.nan
    with pytest.raises(LogitsError, match="row 33") as refusal:
        log_softmax_at(logits, torch.full((40,), 3))
    assert refusal.value.rows == (33,)
