"""The engine through its public surface, over a scripted model: the tree, scheduler, sampler and fronts are real."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.engine.errors import (
    BranchError,
    ContextOverflow,
    EngineClosed,
    EngineDead,
    OutOfBlocks,
    RequestError,
)
from dendrite.engine.loop import StepLoop
from dendrite.testing import scripted_engine
from dendrite.testing.runner import ScriptedRunner


def reply(text: str) -> str | list[str]:
    """The script: digits count on, a question has two answers, everything else is echoed with a full stop."""
    if text.endswith("?"):
        return [" yes.", " no."]
    if text[-1:].isdigit():
        return str((int(text[-1]) + 1) % 10) * 30
    return " so it is.\nAnd more."


@pytest.fixture(autouse=True, params=[0, 1], ids=["in step", "looking ahead"])
def _look_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs twice: as on the CPU, and with a step in flight while the next one is launched."""
    monkeypatch.setattr(ScriptedRunner, "look_ahead", request.param)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine whose pool must be whole again at the end."""
    with scripted_engine(reply) as made:
        yield made
        made.check_integrity()


def everything(engine: Engine) -> tuple[int, int]:
    """What a refused call must not change: blocks in use and live branches."""
    stats = engine.stats()
    return stats.blocks_used, stats.branches


def test_generate_follows_the_model(engine: Engine) -> None:
    """Greedy text, its tokens, its log-probabilities, and the branch that holds them."""
    root = engine.root("count 1")
    out = root.generate(max_tokens=3)
    assert out.text == "222"
    assert out.finish_reason == "length"
    assert root.text == "count 1222"
    assert out.token_ids == tuple(root.token_ids[-3:])
    assert len(out.logprobs) == 3
    assert all(value <= 0 for value in out.logprobs)
    assert root.logprobs == list(out.logprobs)


def test_a_fork_goes_on_alone(engine: Engine) -> None:
    """What one branch appends or generates, no other sees."""
    root = engine.root("a 1")
    a, b = root.fork(2)
    a.append(" 5")
    outs = engine.generate([a, b, root], max_tokens=2)
    assert [out.text for out in outs] == ["66", "22", "22"]
    assert (a.text, b.text, root.text) == ("a 1 566", "a 122", "a 122")
    assert (a.parent, root.children, a.depth, root.depth) == (root, [a, b], 1, 0)


def test_fork_at_a_past_position(engine: Engine) -> None:
    """Every offset of the path gives the same text as a fresh prompt."""
    root = engine.root("x 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6")
    root.generate(max_tokens=4)
    for at in range(1, root.num_tokens + 1):
        (fork,) = root.fork(1, at=at)
        fresh = engine.root(token_ids=root.token_ids[:at])
        assert fork.token_ids == fresh.token_ids
        assert fork.generate(max_tokens=4).text == fresh.generate(max_tokens=4).text


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    """`branch.text` equals the prompt and the generation's text; the branch can go on from there."""
    root = engine.root("well")
    out = root.generate(max_tokens=40, stop=["\n", "never"])
    assert (out.text, out.finish_reason) == (" so it is.", "stop")
    assert root.text == "well so it is."
    root.append(" 4")
    assert root.generate(max_tokens=1).text == "5"


def test_an_end_of_text_token_is_not_kept(engine: Engine) -> None:
    """The script ends after its reply; the branch holds the reply alone."""
    root = engine.root("is it?")
    out = root.generate(max_tokens=40, stop=["."])
    assert out.text in (" yes", " no")
    out = engine.root("well").generate(max_tokens=400)
    assert out.finish_reason == "eos"
    assert out.text == " so it is.\nAnd more."


def test_score_is_the_log_probability_of_each_choice_and_keeps_nothing(engine: Engine) -> None:
    """The two scripted answers share the mass; a stranger has next to none; the branch stays as it was."""
    root = engine.root("is it?")
    before = root.token_ids
    yes, no, other = root.score([" yes.", " no.", " maybe."])
    assert yes == pytest.approx(no, abs=0.2)
    assert yes > other + 5
    assert (root.token_ids, root.children, root.status) == (before, [], "idle")
    assert engine.stats().branches == 1


def test_score_takes_token_ids_as_well(engine: Engine) -> None:
    """A continuation that is not text for the program, or not to be encoded again, is scored as it stands."""
    root = engine.root("is it?")
    ids = [engine.tokenizer.encode(text) for text in (" yes.", " no.")]
    assert root.score(ids) == root.score([" yes.", " no."])


def test_equal_prompts_differ_without_a_seed_and_agree_with_one(engine: Engine) -> None:
    """Each root has a salt of its own; equal seeds draw equally, forks of one seed differently."""
    free = [engine.root("is it?").generate(max_tokens=5, temperature=1.0).text for _ in range(16)]
    assert len(set(free)) == 2
    seeded = [engine.root("is it?", seed=3).generate(max_tokens=5, temperature=1.0).text for _ in range(4)]
    assert len(set(seeded)) == 1
    forks = engine.root("is it?", seed=3).fork(16)
    assert len({out.text for out in engine.generate(forks, max_tokens=5, temperature=1.0)}) == 2


def test_the_same_seed_repeats_a_batch_of_forks(engine: Engine) -> None:
    """Keys follow the path from the root, not the order of other calls."""

    def run() -> list[str]:
        root = engine.root("is it?", seed=5)
        forks = root.fork(8)
        engine.root("noise").generate(max_tokens=2, temperature=1.0)
        return [out.text for out in engine.generate(forks, max_tokens=5, temperature=1.0)]

    assert run() == run()


def test_a_fork_with_a_seed_repeats_itself(engine: Engine) -> None:
    """fork(seed=) does not depend on how often the parent was forked before."""
    root = engine.root("is it?")
    texts = [
        [out.text for out in engine.generate(root.fork(8, seed=11), max_tokens=5, temperature=1.0)] for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_equal_roots_are_computed_once(engine: Engine) -> None:
    """The second root shares the first one's tokens, in flight or not."""
    prompt = "the same long prompt " * 5 + "1"
    branches = [engine.root(prompt) for _ in range(4)]
    engine.generate(branches, max_tokens=2)
    stats = engine.stats()
    assert stats.tokens_shared == 3 * (branches[0].num_tokens - 2)
    assert stats.tokens_computed < 1.5 * len(prompt)
    assert [branch.text for branch in branches] == [prompt + "22"] * 4


def test_streaming_gives_the_same_text_in_pieces(engine: Engine) -> None:
    """Nothing of a stop string is shown, and the pieces join to the generation's text."""
    root = engine.root("well")
    pieces = list(root.stream(max_tokens=40, stop="\nAnd"))
    assert "".join(pieces) == " so it is."
    assert len(pieces) > 3
    assert root.text == "well so it is."


def test_a_stream_closed_early_keeps_what_it_has(engine: Engine) -> None:
    """The branch is idle and usable at once."""
    root = engine.root("well")
    stream = root.stream(max_tokens=400, ignore_eos=True)
    first = next(stream)
    stream.close()
    assert root.status == "idle"
    assert root.text.startswith("well" + first)
    root.append("?").generate(max_tokens=2)


async def test_a_hundred_tasks_share_the_engine(engine: Engine) -> None:
    """Every task gets its own answer, and the steps were shared."""
    roots = [engine.root(f"task {i} {i % 10}") for i in range(100)]
    outs = await asyncio.gather(*(root.agenerate(max_tokens=6) for root in roots))
    for i, out in enumerate(outs):
        assert out.text[0] == str((i % 10 + 1) % 10)
    assert engine.stats().steps < 100


async def test_astream_and_aclose() -> None:
    """The asyncio fronts: pieces while generating, and a close that does not block."""
    async with scripted_engine(reply) as engine:
        root = engine.root("well")
        assert "".join([piece async for piece in root.astream(max_tokens=40, stop="\n")]) == " so it is."
    with pytest.raises(EngineClosed):
        engine.root("again")


async def test_a_cancelled_task_leaves_its_branch_as_it_was(engine: Engine) -> None:
    """In the queue, at the first step, in the middle: the branch is idle, unchanged and usable at once."""
    for delay in (0, 0.001, 0.01, 0.05):
        root = engine.root("well")
        before = root.token_ids
        task = asyncio.create_task(root.agenerate(max_tokens=1500, ignore_eos=True))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (root.status, root.token_ids) == ("idle", before)
        assert root.generate(max_tokens=3).text == " so"
        engine.check_integrity()


def test_pruning_a_running_branch_ends_its_generation(engine: Engine) -> None:
    """The waiter gets what there was, marked cancelled; the blocks are free when prune returns."""
    root = engine.root("well")
    outs = []
    waiter = threading.Thread(target=lambda: outs.append(root.generate(max_tokens=1500, ignore_eos=True)))
    waiter.start()
    while root.status != "running":
        time.sleep(0.001)
    root.prune()
    assert engine.stats().blocks_used == 0
    waiter.join()
    assert outs[0].finish_reason == "cancelled"
    with pytest.raises(BranchError, match="pruned"):
        root.fork()


def test_pruning_everything_frees_everything(engine: Engine) -> None:
    """Free and cached blocks are all blocks, cached ones are free on request, and pruning twice is fine."""
    root = engine.root("well 1")
    forks = root.fork(8)
    engine.generate(forks, max_tokens=20)
    for branch in (root, *forks, *forks):
        branch.prune()
    stats = engine.stats()
    assert (stats.blocks_used, stats.branches, stats.nodes) == (0, 0, 0)
    assert stats.blocks_free + stats.blocks_cached == stats.blocks_total
    engine.clear_cache()
    assert engine.stats().blocks_free == stats.blocks_total


def test_what_a_caller_sees_waits_for_no_thread(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's thread is not at rest when the caller wakes up: what was dropped is free, and the step is counted."""
    rest, gate = StepLoop._wait_for_work, threading.Event()

    def late(loop: StepLoop) -> bool:
        if loop.counters.num_steps:
            gate.wait()
        return rest(loop)

    monkeypatch.setattr(StepLoop, "_wait_for_work", late)
    try:
        engine.root("well").generate(max_tokens=5)
        stats = engine.stats()
    finally:
        gate.set()
    assert (stats.branches, stats.blocks_used) == (0, 0)
    assert (stats.tokens_sampled, stats.tokens_logical) == (5, 10)
    assert stats.tokens_per_second > 0


def test_collected_branches_free_their_blocks(engine: Engine) -> None:
    """No handle, no blocks: what Python collects is given back."""
    engine.root("well").generate(max_tokens=5)
    assert engine.stats().blocks_used == 0
    with engine.root("well") as root:
        root.generate(max_tokens=5)
        assert engine.stats().blocks_used > 0
    assert engine.stats().blocks_used == 0


def test_a_busy_branch_refuses_to_change_but_can_be_forked(engine: Engine) -> None:
    """append, generate: BranchError; fork: a snapshot of what there is."""
    root = engine.root("well")
    stream = root.stream(max_tokens=1500, ignore_eos=True)
    next(stream)
    with pytest.raises(BranchError, match="running"):
        root.append("x")
    with pytest.raises(BranchError, match="running"):
        root.generate()
    fork = root.fork()
    assert fork.text.startswith("well")
    assert fork.generate(max_tokens=2).finish_reason == "length"
    stream.close()


BAD_CALLS: dict[str, tuple[type[Exception], Callable[[Branch], object]]] = {
    "negative temperature": (RequestError, lambda b: b.generate(temperature=-1.0)),
    "no tokens": (RequestError, lambda b: b.generate(max_tokens=0)),
    "a bias outside the vocabulary": (RequestError, lambda b: b.generate(logit_bias={10**6: 1.0})),
    "a stop token outside the vocabulary": (RequestError, lambda b: b.generate(stop_token_ids=[10**6])),
    "an unknown option": (RequestError, lambda b: b.generate(heat=1.0)),  # type: ignore[call-arg]  # on purpose
    "fork(0)": (BranchError, lambda b: b.fork(0)),
    "at=0": (BranchError, lambda b: b.fork(1, at=0)),
    "at beyond the end": (BranchError, lambda b: b.fork(1, at=1000)),
    "no choices": (RequestError, lambda b: b.score([])),
    "an empty choice": (RequestError, lambda b: b.score(["yes", ""])),
    "a choice of no tokens": (RequestError, lambda b: b.score([[65], []])),
    "a choice outside the vocabulary": (RequestError, lambda b: b.score([[10**6]])),
    "append nothing": (RequestError, lambda b: b.append()),
    "append both": (RequestError, lambda b: b.append("x", messages=[{"role": "user", "content": "x"}])),
    "messages on a text": (BranchError, lambda b: b.append(messages=[{"role": "user", "content": "x"}])),
    "token out of range": (RequestError, lambda b: b.append([10**6])),
    "append beyond the context": (ContextOverflow, lambda b: b.append([65] * 10**5)),
    "listed twice": (BranchError, lambda b: b.engine.generate([b, b])),
    "no branches": (RequestError, lambda b: b.engine.generate([])),
    "empty prompt": (RequestError, lambda b: b.engine.root("")),
    "empty token ids": (RequestError, lambda b: b.engine.root(token_ids=[])),
    "two prompts": (RequestError, lambda b: b.engine.root("x", messages=[])),  # type: ignore[call-overload]  # on purpose
    "prompt beyond the context": (ContextOverflow, lambda b: b.engine.root(token_ids=[65] * 10**5)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_gets_a_typed_error_and_changes_nothing(engine: Engine, name: str) -> None:
    """Each refusal names its reason, and branch, blocks and tree are as before."""
    error, call = BAD_CALLS[name]
    branch = engine.root("well")
    branch.generate(max_tokens=3)
    before = (branch.token_ids, branch.status, branch.children, everything(engine))
    with pytest.raises(error):
        call(branch)
    assert (branch.token_ids, branch.status, branch.children, everything(engine)) == before


def test_a_foreign_branch_is_refused(engine: Engine) -> None:
    """Two engines in one process know nothing of each other."""
    with scripted_engine(reply) as other:
        stranger = other.root("well")
        with pytest.raises(BranchError, match="another engine"):
            engine.generate([stranger])
        assert stranger.generate(max_tokens=3).text == " so"


def test_a_pool_too_small_names_what_is_missing() -> None:
    """generate, root and append: needed, free and prunable, and the tree as it was."""
    with scripted_engine(reply, num_blocks=8, block_size=4) as engine:
        root = engine.root("0123456789")
        idle = engine.root("abcdefgh")
        idle.score(["x"])
        before = (root.token_ids, everything(engine))
        with pytest.raises(OutOfBlocks) as caught:
            root.generate(max_tokens=100)
        assert caught.value.needed > caught.value.free
        assert caught.value.prunable > 0
        with pytest.raises(OutOfBlocks):
            root.append("x" * 50)
        with pytest.raises(OutOfBlocks):
            engine.root("y" * 50)
        assert (root.token_ids, everything(engine)) == before
        assert root.generate(max_tokens=4).text == "0000"


def test_a_closed_engine_says_so_and_wakes_its_waiters() -> None:
    """Open calls and later ones get `EngineClosed`; closing twice is fine."""
    engine = scripted_engine(reply)
    root = engine.root("well")
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            root.generate(max_tokens=1500, ignore_eos=True)
        except EngineClosed as error:
            failures.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    while root.status != "running":
        time.sleep(0.001)
    engine.close()
    waiter.join()
    engine.close()
    assert len(failures) == 1
    for call in (lambda: engine.root("x"), root.fork, root.generate):
        with pytest.raises(EngineClosed):
            call()
    root.prune()


def test_a_loop_that_dies_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours in the loop: the waiter and all later calls get `EngineDead` with its cause."""

    def broken() -> None:
        raise ZeroDivisionError("off a cliff")

    engine = scripted_engine(lambda _: "fine")
    monkeypatch.setattr(engine.core.loop.scheduler, "schedule", broken)
    with pytest.raises(EngineDead) as caught:
        engine.root("fall").generate(max_tokens=5)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(EngineDead):
        engine.root("x")
    engine.close()


def test_stats_tell_the_shape_of_the_tree(engine: Engine) -> None:
    """Blocks add up; logical counts what physical shares; depths and references are histograms."""
    root = engine.root("the plan is 1")
    root.generate(max_tokens=3)
    forks = root.fork(4)
    deeper = forks[0].fork()
    engine.generate(forks, max_tokens=4)
    stats = engine.stats()
    assert stats.blocks_used + stats.blocks_cached + stats.blocks_free == stats.blocks_total
    assert stats.depth_histogram == {0: 1, 1: 4, 2: 1}
    assert stats.branches == 6
    assert stats.logical_tokens > stats.physical_tokens
    assert sum(stats.ref_counts.values()) == stats.nodes
    assert stats.copy_on_writes >= 3
    assert stats.forks == 5
    assert stats.tokens_sampled == 3 + 16
    assert stats.tokens_logical > stats.tokens_computed
    assert deeper.depth == 2


def test_a_chat_goes_on_with_messages(engine: Engine) -> None:
    """What was generated becomes the assistant's turn; the common prefix of tokens stays."""
    root = engine.root(messages=[{"role": "user", "content": "count 1"}])
    said = root.generate(max_tokens=3, temperature=0.0)
    length = root.num_tokens
    root.append(messages=[{"role": "user", "content": "and 5"}])
    assert root.num_tokens > length
    assert said.text in root.text
    again = root.generate(max_tokens=3)
    assert again.finish_reason in ("length", "eos")


def test_branch_handles_read_well(engine: Engine) -> None:
    """repr, value and status."""
    root = engine.root("well")
    root.value = 0.5
    assert repr(root) == f"<Branch depth=0 tokens={root.num_tokens} idle>"
    root.prune()
    assert repr(root) == "<Branch depth=0 pruned>"
    assert isinstance(root, Branch)
