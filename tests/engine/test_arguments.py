"""Arguments of the wrong type: a typed error that says what to do, and nothing changed, whatever was handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import dendrite as dd
from dendrite.testing import scripted_engine

HALF = "a\udc80"
"""What decoding with `surrogateescape` leaves of a broken byte."""


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(lambda _: [" and so on"]) as engine:
        yield engine
        engine.check_integrity()


Call = Callable[[dd.Engine, dd.Branch], object]


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda engine, _: engine.root(3), "text 3 cannot be used: give text"),
        (lambda engine, _: engine.root(b"bytes"), "give text"),
        (lambda engine, _: engine.root(HALF), 'half a character, .* at 1: .*errors="replace"'),
        (lambda engine, _: engine.root(messages=3), 'messages must be one or more of {"role"'),
        (lambda engine, _: engine.root(messages=[{"role": "bard", "content": ""}]), "has role 'bard': give one of"),
        (lambda engine, _: engine.root(messages=[{"role": "user", "content": None}]), "content None cannot be used"),
        (lambda engine, _: engine.root(messages=[{"role": "user", "content": HALF}]), "half a character"),
        (lambda engine, _: engine.root(token_ids=3), "give token ids, a list of whole numbers"),
        (lambda engine, _: engine.root(token_ids="3"), "give token ids"),
        (lambda engine, _: engine.root(token_ids=[1, 2.0]), "holds 2.0, which is no token id"),
        (lambda engine, _: engine.root(token_ids=[None]), "holds None, which is no token id"),
        (lambda engine, _: engine.root(token_ids=[1, 10**9]), "token id 1000000000 is out of range"),
        (lambda engine, _: engine.root("a", seed="x"), "seed='x' cannot be used: give a whole number"),
        (lambda _, branch: branch.fork("2"), r"fork\('2'\): give a whole number, 1 or more"),
        (lambda _, branch: branch.fork(1.5), r"fork\(1.5\): give a whole number"),
        (lambda _, branch: branch.fork(1, at=1.5), r"fork\(at=1.5\): the branch has 5 tokens; give 1 to 5"),
        (lambda _, branch: branch.fork(1, seed=1.5), "seed=1.5 cannot be used"),
        (lambda _, branch: branch.append(3), "content 3 cannot be used"),
        (lambda _, branch: branch.append(HALF), "half a character"),
        (lambda _, branch: branch.score(3), "give a list of choices, at least one"),
        (lambda _, branch: branch.score([3]), "choice 0 3 cannot be used"),
        (lambda engine, branch: engine.generate(branch), "takes a list of branches: put this one in one"),
        (lambda engine, _: engine.generate([None]), "give a list of branches, as root"),
        (lambda engine, branch: next(engine.stream([branch])), "give one branch, as root"),
        (lambda engine, branch: engine.submit([branch], priority="high"), "priority='high' cannot be used"),
        (lambda engine, branch: engine.submit_score(branch, ["a"], priority=float("nan")), "priority=nan"),
        (lambda _, branch: setattr(branch, "value", "high"), "value='high' cannot be used: give a number"),
        (lambda _, branch: setattr(branch, "value", float("nan")), "value=nan cannot be used"),
        (lambda _, __: dd.Engine.load(3), r"load\(3\): give a short name, a hub id or a folder"),  # type: ignore[arg-type]  # what is tested
    ],
)
def test_a_wrong_type_is_refused_and_changes_nothing(engine: dd.Engine, call: Call, complaint: str) -> None:
    """Every one of them reached the tree or the step loop before, or ended as a bare `TypeError`."""
    branch = engine.root("Once")
    branch.generate(max_tokens=2)
    branch.value = 0.5
    before = (engine.stats().blocks_used, branch.token_ids[:5], branch.value, branch.status)
    with branch.fork(1, at=5)[0] as fork, pytest.raises(dd.EngineError, match=complaint) as caught:
        call(engine, fork)
    assert isinstance(caught.value, ValueError), "retry policies leave these alone"
    assert (engine.stats().blocks_used, branch.token_ids[:5], branch.value, branch.status) == before


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple, list])
def test_token_ids_may_be_an_array_or_a_tensor(engine: dd.Engine, make: Callable[[list[int]], list[int]]) -> None:
    """They become Python's own numbers, also of NumPy's scalars in a list."""
    ids = engine.root("Once").token_ids
    for given in (make(ids), [np.int64(token) for token in ids]):
        root = engine.root(token_ids=given)  # type: ignore[arg-type]  # NumPy's numbers are no `int` to a checker
        assert root.token_ids == ids
        assert {type(token) for token in root.token_ids} == {int}


def test_a_value_may_be_any_number(engine: dd.Engine) -> None:
    """Rewards often come as scalars of NumPy or as tensors."""
    branch = engine.root("Once")
    for number in (1, np.float32(1), torch.tensor(1.0), True):
        branch.value = number  # type: ignore[assignment]  # what is tested
        assert branch.value == 1.0
        assert type(branch.value) is float
    branch.value = None
    assert branch.value is None
