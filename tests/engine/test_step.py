"""What a step is made of: rows and who reads them, copies before the pass, and what must wait for the next one."""

from __future__ import annotations

from dendrite.engine.requests import Group, ScoreRequest
from tests.engine.test_scheduler import generate, make, step


def test_forks_of_a_computed_parent_need_no_row_for_their_first_token() -> None:
    """The parent's last hidden row is kept, so eight forks draw from it without a pass."""
    tree, scheduler = make()
    root, _ = tree.new_root([1, 2, 3])
    (request,) = generate(scheduler, root)
    step(scheduler)
    scheduler.remove(request)
    requests = generate(scheduler, *[tree.fork(root) for _ in range(8)])
    found = step(scheduler)
    assert found.batch is None
    assert [read.request for read in found.reads] == requests
    assert {read.source for read in found.reads} == {("hidden", 0)}


def test_what_a_fork_computed_of_its_parent_gives_the_parents_first_token() -> None:
    """A value was asked on a fork; the search goes on from the parent itself, without a pass for its last token."""
    tree, scheduler = make()
    root, _ = tree.new_root([1, 2, 3])
    asked = tree.fork(root)
    tree.extend(asked, [7, 8])
    (request,) = generate(scheduler, asked)
    first = step(scheduler)
    assert (first.num_rows, [read.source for read in first.reads]) == (5, [1])
    scheduler.remove(request)
    generate(scheduler, tree.fork(root))
    found = step(scheduler)
    assert found.batch is None
    assert [read.source for read in found.reads] == [("hidden", 0)]


def test_a_fork_at_a_past_position_recomputes_one_token() -> None:
    """Its row writes to the trash block and reads the keys up to itself."""
    tree, scheduler = make()
    root, _ = tree.new_root(list(range(10)))
    (request,) = generate(scheduler, root)
    step(scheduler)
    scheduler.remove(request)
    generate(scheduler, tree.fork(root, at=6))
    found = step(scheduler)
    assert found.batch is not None
    assert (found.batch.token_ids, found.batch.positions, found.batch.slots) == ([5], [5], [0])
    assert [segment.num_keys for segment in found.batch.plan.segments] == [6]


def test_a_copy_waits_for_the_tokens_it_copies() -> None:
    """Two children of an uncomputed tail: the first shares it in this step, the second copies it in the next."""
    tree, scheduler = make()
    root, _ = tree.new_root([1, 2])
    a, b = tree.fork(root), tree.fork(root)
    tree.extend(a, [3])
    tree.extend(b, [4])
    requests = generate(scheduler, a, b)
    first = step(scheduler)
    assert first.batch is not None
    assert (first.num_rows, first.batch.copies) == (3, [])
    assert [read.request for read in first.reads] == requests[:1]
    scheduler.remove(requests[0])
    second = step(scheduler)
    assert second.batch is not None
    assert (second.num_rows, len(second.batch.copies)) == (1, 1)
    tree.check_integrity()


def test_a_copy_does_not_wait_for_a_parent_that_goes_on() -> None:
    """What it copies is there: branches of one prompt decode in one step, whoever writes on in its block."""
    tree, scheduler = make()
    root, _ = tree.new_root([1, 2])
    (request,) = generate(scheduler, root)
    step(scheduler)
    scheduler.remove(request)
    fork = tree.fork(root)
    tree.extend(root, [3])
    tree.extend(fork, [4])
    requests = generate(scheduler, root, fork)
    found = step(scheduler)
    assert found.batch is not None
    assert (found.num_rows, len(found.batch.copies)) == (2, 1)
    assert [read.request for read in found.reads] == requests
    tree.check_integrity()


def test_a_copy_waits_for_a_block_that_is_a_copy_itself() -> None:
    """A fork went on in the root's block, so the root copies it; another fork copies the root's copy a step later."""
    tree, scheduler = make()
    root, _ = tree.new_root([1, 2])
    first = tree.fork(root)
    tree.extend(first, [3])
    (request,) = generate(scheduler, first)
    step(scheduler)
    scheduler.remove(request)
    second = tree.fork(root)
    tree.extend(root, [4])
    tree.extend(second, [5])
    requests = generate(scheduler, root, second)
    found = step(scheduler)
    assert found.batch is not None
    assert (found.num_rows, len(found.batch.copies)) == (1, 1)
    assert [read.request for read in found.reads] == requests[:1]
    scheduler.remove(requests[0])
    later = step(scheduler)
    assert later.batch is not None
    assert later.batch.copies[0][0] == found.batch.copies[0][1]
    tree.check_integrity()


def test_a_score_reads_every_candidate_in_one_pass_and_leaves_nothing() -> None:
    """Three candidates of 1, 2 and 3 tokens: 0 + 1 + 2 sibling rows, 1 + 2 + 3 reads, no block afterwards."""
    tree, scheduler = make()
    root, _ = tree.new_root([1, 2, 3, 4])
    request = ScoreRequest(tree.fork(root), [[5], [6, 7], [8, 9, 10]])
    scheduler.submit(Group([request]))
    found = step(scheduler)
    assert found.num_rows == 4 + 0 + 1 + 2
    assert sorted((read.candidate, read.index) for read in found.reads) == [
        (0, 0),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    assert request.is_complete
    scheduler.remove(request)
    assert tree.pool.num_used == 1
    tree.check_integrity()
