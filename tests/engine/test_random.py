"""Keys and uniform numbers: known values, independence, and the vectorised form."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from dendrite.engine.random import GOLDEN, child_key, mix, root_key, uniform
from dendrite.engine.sampling_draw import uniforms

KEYS = st.integers(0, 2**64 - 1)


def test_mix_is_the_finaliser_of_splitmix64() -> None:
    """The first outputs of SplitMix64 from state 1234567, as its published test vectors give them."""
    states = [1234567 + GOLDEN * step for step in range(1, 4)]
    assert [mix(state) for state in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_draws_stay_as_they_are() -> None:
    """A change of these numbers changes what every seed gives, and must be told to users."""
    key = child_key(root_key(7), 2)
    assert (root_key(7), key, uniform(key, 100)) == (13872219882324041502, 5260500048424568520, 0.08023140279658547)


@given(KEYS, st.integers(0, 2**31))
def test_uniform_is_in_the_half_open_interval(key: int, position: int) -> None:
    """0 may come, 1 may not."""
    assert 0 <= uniform(key, position) < 1


@given(st.lists(st.tuples(KEYS, st.integers(0, 2**40)), min_size=1, max_size=20))
def test_the_vectorised_form_gives_the_same_bits(pairs: list[tuple[int, int]]) -> None:
    """Sampling on a device draws what the plain Python function says."""
    keys, positions = zip(*pairs, strict=True)
    values = uniforms(keys, positions, torch.device("cpu"))
    assert values.tolist() == [uniform(key, position) for key, position in pairs]


def test_the_numbers_are_spread_evenly() -> None:
    """50,000 draws of related keys in 100 bins: the chi-square of 99 degrees of freedom is under its 99.99% point."""
    keys = [child_key(root_key(seed), index) for seed, index in itertools.product(range(10), range(10))]
    counts = [0] * 100
    for key, position in itertools.product(keys, range(500)):
        counts[int(uniform(key, position) * 100)] += 1
    assert sum((count - 500) ** 2 / 500 for count in counts) < 161.3


def test_relatives_have_different_keys() -> None:
    """Parents, children, roots and small seeds never share a key, nor does a draw repeat one's upper bits."""
    roots = [root_key(salt) for salt in range(-20, 200)]
    children = [child_key(root, index) for root in roots for index in range(20)]
    keys = roots + children
    assert len({key >> 11 for key in keys}) == len(keys)
    draws = {int(uniform(root, position) * 2**53) for root in roots for position in range(20)}
    assert draws.isdisjoint(key >> 11 for key in keys)


def test_a_child_key_depends_on_the_whole_path() -> None:
    """Child 1 of child 0 is not child 0 of child 1."""
    root = root_key(0)
    assert child_key(child_key(root, 0), 1) != child_key(child_key(root, 1), 0)
