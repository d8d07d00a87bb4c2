"""The state machine against seeded bugs: what it would not notice, it does not test."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.engine import test_cache, test_planner, test_step
from tests.engine.mutations import MUTATIONS, Mutation
from tests.engine.test_tree_model import TreeMachine

QUICK = settings(
    max_examples=800,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


DIRECTED = (
    test_cache.test_a_branch_that_goes_on_evicts_what_was_cached_behind_it,
    test_step.test_a_copy_waits_for_the_tokens_it_copies,
    test_step.test_a_copy_waits_for_a_block_that_is_a_copy_itself,
    test_planner.test_keys_that_came_back_elsewhere_are_not_taken_for_those_of_before,
    test_planner.test_a_key_that_others_read_is_nobodys_own,
)
"""For what random programs of this length come upon too rarely."""


def everything() -> None:
    for test in DIRECTED:
        test()
    run_state_machine_as_test(TreeMachine, settings=QUICK)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_seeded_bug_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change makes a test fail; without it, what is run here passes elsewhere in the suite."""
    mutation.apply(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError, ExceptionGroup)):
        everything()
