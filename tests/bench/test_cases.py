"""The suite's cases as data: the same for every engine, and as large as they were when others were measured."""

import json

import pytest

from dendrite.bench.cases import (
    WORKLOADS,
    Case,
    Decode,
    Fanout,
    MonteCarlo,
    Prompts,
    Thoughts,
    check_workloads,
    from_message,
    to_message,
)
from dendrite.bench.floors import RATES, Dimensions, floor_of, rates_of
from dendrite.bench.goals import H200_8B, goal_of
from dendrite.bench.shapes import config_of
from dendrite.bench.sizes import SIZES
from dendrite.engine.errors import RequestError

CASES = {
    f"{size}, {case.name}": case for size, sizes in SIZES.items() for name in WORKLOADS for case in sizes.cases(name)
}
H200 = RATES["H200"]


@pytest.mark.parametrize("name", CASES)
def test_case_survives_the_way_to_a_peer(name: str) -> None:
    """A case written as JSON and read again is the same, and draws the same prompts."""
    case = CASES[name]
    arrived = from_message(json.loads(json.dumps(to_message(case))))
    assert arrived == case
    assert Prompts(arrived, 2000).tokens(20) == Prompts(case, 2000).tokens(20)


@pytest.mark.parametrize("size", SIZES)
def test_names_are_unique(size: str) -> None:
    """A case's name finds it among all of a run."""
    names = [case.name for workload in WORKLOADS for case in SIZES[size].cases(workload)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("vocab_size", [8, 320, 2000, 200_000])
def test_prompts_are_in_the_vocabulary(vocab_size: int) -> None:
    """Small vocabularies get what they have, and large ones what other engines were given."""
    tokens = Prompts(Fanout(1, 2, 3), vocab_size).tokens(200)
    assert all(0 <= token < min(vocab_size, 120_000) for token in tokens)


def test_lengths_replace_the_usual_ones() -> None:
    """What is given is replaced, everywhere it counts, and the rest stays."""
    sizes = SIZES["full"].with_lengths(prefixes=(64,), branches=(3,), batches=(2,), tokens=5)
    assert [case.name for case in sizes.cases("fanout")] == ["fanout: 3 × 5 over 64"]
    assert [case.name for case in sizes.cases("score")] == ["score: 8 × 8 tokens after 64"]
    assert [case.name for case in sizes.cases("decode")] == ["decode: batch 2"]
    assert sizes.cases("tot") == SIZES["full"].cases("tot")


def test_monte_carlo_grows_the_same_tree_everywhere() -> None:
    """Each iteration expands a node that is there, and depths follow from the picks."""
    case = MonteCarlo(prompt=10, iterations=20, branch=3, tokens=2)
    assert all(pick < 1 + number * 3 for number, pick in enumerate(case.picks()))
    assert len(case.depths()) == 61
    assert case.length == 10 + max(case.depths()) * 2 + 5


@pytest.mark.parametrize(
    "case, requested",
    [
        (Decode(batch=2, prompt=10, short=1, long=3), 40),
        (Fanout(prefix=10, branches=4, tokens=1), 40),
        (Thoughts(prompt=10, depth=2, keep=2, branch=3, tokens=5), 3 * (2 * 10 + 9) + 6 * (2 * 15 + 9)),
        (MonteCarlo(prompt=10, iterations=1, branch=2, tokens=5), 2 * (2 * 10 + 9)),
    ],
    ids=lambda value: value.workload if isinstance(value, Case) else "",
)
def test_requested_counts_every_prompt_in_full(case: Case, requested: int) -> None:
    """What an engine without shared prefixes computes: each path, and again with what it gained and the cue."""
    assert case.requested == requested


@pytest.mark.parametrize(
    "name, least, most",
    [
        ("decode: batch 1", 3.53, 3.6),
        ("fanout: 8 × 128 over 1,024", 450, 480),
        ("fanout: 64 × 128 over 32,768", 670, 710),
        ("first-token: 8 children of 32,768", 4.5, 4.6),
        ("tot: depth 4, branch 5, keep 5, 48 tokens", 700, 780),
        ("mcts: 32 iterations, 3 × 32 tokens", 3700, 3800),
    ],
)
def test_floors_of_an_8b_shape(name: str, least: float, most: float) -> None:
    """Weights once a step at the measured bandwidth, shared K/V once, and the products where they take longer."""
    dimensions = Dimensions.of(config_of("8b"), dtype="bfloat16")
    assert dimensions is not None
    floor = floor_of(CASES[f"full, {name}"], dimensions, H200)
    assert floor is not None
    assert least <= floor <= most


def test_unknown_device_has_no_floor() -> None:
    """Nobody measured it, so nothing is claimed; what memory must hold is known without it."""
    dimensions = Dimensions.of(config_of("8b"), dtype="bfloat16")
    assert dimensions is not None
    assert rates_of("NVIDIA H200, 150 GB") is H200
    assert rates_of("Some other GPU") is None
    assert rates_of("") is None
    assert floor_of(CASES["full, decode: batch 1"], dimensions, None) is None
    memory = floor_of(CASES["full, memory: 8 × 128 over 1,024"], dimensions, None)
    assert memory == pytest.approx((1024 + 8 * 128) * 131_072 / 1e6)


def test_goals_are_of_cases_that_there_are() -> None:
    """Every goal belongs to a case of the full size, on the machine it was set for."""
    for name, goal in H200_8B.items():
        case = CASES[f"full, {name}"]
        assert goal_of(case, shape="8b", gpu="NVIDIA H200, 150 GB") == goal
        assert goal_of(case, shape="1b", gpu="NVIDIA H200, 150 GB") is None
        assert goal_of(case, shape="8b", gpu="") is None


def test_unknown_workload_names_those_there_are() -> None:
    """A typing error is found before anything is loaded."""
    with pytest.raises(RequestError, match="decode, fanout"):
        check_workloads(("fanuot",))
