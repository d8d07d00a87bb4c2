"""The state machine against seeded bugs: what it would not notice, it does not test."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.engine.mutations import MUTATIONS, Mutation
from tests.engine.test_tree_model import TreeMachine

QUICK = settings(
    max_examples=400,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_seeded_bug_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change makes some random program fail, and no change makes it fail to stop."""
    mutation.apply(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError, ExceptionGroup)):
        run_state_machine_as_test(TreeMachine, settings=QUICK)  # type: ignore[no-untyped-call]
