"""The test helpers themselves: nodes without a search, and an engine that follows a script."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import dendrite as dd
from dendrite.engine.batch import Batch, Plan, Segment
from dendrite.engine.ids import BlockId
from dendrite.testing import Reply, node, scripted_engine
from dendrite.testing.runner import ScriptedRunner
from dendrite.testing.tokenizer import BEGIN, END, ByteTokenizer


@dataclass(frozen=True)
class Game:
    left: tuple[int, ...] = ()


def script(text: str) -> Reply:
    if text.endswith("good?"):
        return {" yes": 0.75, " no": 0.25}
    if text.endswith("Go:"):
        return [" left\n", " right\n"]
    return "" if text.endswith("silent") else " …häß 🌳"


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()


def test_a_node_is_what_it_was_told() -> None:
    """Text, state, transcript, depth, value and reflections, without any engine."""
    made = node(" 4+9=13", state=Game((4, 9)), transcript="Go.\nStep:", depth=2, value=0.5, reflections=["Think."])
    assert made.text == " 4+9=13"
    assert made.state.left == (4, 9)
    assert made.transcript == "Go.\nStep: 4+9=13"
    assert made.depth == 2
    assert made.value == 0.5
    assert list(made.reflections) == ["Think."]
    assert [above.depth for above in made.path] == [0, 1, 2]
    assert made.parent is not None
    assert made.parent.state == Game((4, 9))


def test_a_node_has_sensible_defaults() -> None:
    """A root, or the child of one if it has text; a transcript may have the text already."""
    assert node().depth == 0
    assert node().parent is None
    assert node("x").depth == 1
    assert node("x", transcript="say x").transcript == "say x"
    assert node().value is None


def test_a_decorated_body_is_called_directly() -> None:
    """What unit tests of programs look like."""

    @dd.observe
    def apply(node: dd.Node[Game]) -> dd.Outcome[Game]:
        return dd.Outcome(node.state, goal=node.state.left == (24,))

    assert apply(node("4 * 6", state=Game((24,)))).goal
    assert not apply(node("4 + 6", state=Game((10,)))).goal


def test_the_engine_follows_the_script(engine: dd.Engine) -> None:
    """Greedy takes the first of equally likely replies, sampling takes all; text is text, unicode too."""
    assert engine.root("Go:").generate(stop="\n").text == " left"
    assert engine.root("anything").generate().text == " …häß 🌳"
    assert engine.root("silent").generate().text == ""
    branches = engine.root("Go:", seed=1).fork(16)
    texts = {out.text for out in engine.generate(branches, temperature=1.0, stop="\n")}
    assert texts == {" left", " right"}
    assert engine.root("x").generate().finish_reason == "eos"


def test_scores_follow_the_script(engine: dd.Engine) -> None:
    """A label has the probability of the replies that begin with it."""
    logprobs = engine.root("Is it good?").score([" yes", " no", " maybe", " "])
    assert [math.exp(logprob) for logprob in logprobs] == pytest.approx([0.75, 0.25, 0, 1], abs=1e-6)


def test_a_reply_goes_on_after_a_fork(engine: dd.Engine) -> None:
    """Half a reply is continued on every branch, at any offset of a block."""
    root = engine.root("Say:")
    root.generate(max_tokens=5)
    for child in root.fork(3):
        child.generate()
        assert child.text == "Say: …häß 🌳"


def test_turns_are_shown_to_the_script() -> None:
    """As the chat template writes them."""
    seen: set[str] = set()

    def watching(text: str) -> str:
        seen.add(text)
        return "ok"

    with scripted_engine(watching) as engine:
        chat = engine.root(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
        assert chat.generate().text == "ok"
        chat.append(messages=[{"role": "user", "content": "Again"}])
        assert chat.generate().text == "ok"
    first = "<|begin|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert {first, first + "ok<|end|><|user|>Again<|end|><|assistant|>"} <= seen


def test_bytes_come_back_as_text() -> None:
    """Encoding and decoding are inverse; special tokens are read on request only."""
    tokenizer = ByteTokenizer()
    for text in ("", "a", "häß 🌳", "<|end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|end|>", special=True)[-1] == END
    assert tokenizer.encode("a", bos=True)[0] == BEGIN
    assert tokenizer.decode([BEGIN, *tokenizer.encode("a"), END]) == "a"
    assert tokenizer.decode([BEGIN, *tokenizer.encode("a"), END], special=True) == "<|begin|>a<|end|>"


def a_batch(**changes: object) -> Batch:
    """A step that computes two tokens in block 1: `BEGIN` and an opening "a"."""
    segment = Segment(spans=((4, 6),), num_keys=2, row_start=0, row_end=2, causal_rows=2)
    fields: dict[str, object] = {
        "token_ids": [BEGIN, 256 + 97],
        "positions": [0, 1],
        "slots": [4, 5],
        "plan": Plan(2, (segment,)),
        "copies": [],
        "output_rows": [1],
    }
    return Batch(**(fields | changes))  # type: ignore[arg-type]  # each field has its own


def a_runner() -> ScriptedRunner:
    return ScriptedRunner(lambda text: "b", num_blocks=4, block_size=4, context_length=100)


def test_the_runner_reads_the_text_through_the_plan() -> None:
    """Logits say what the script says after the row's own path; a copied block reads as the first."""
    runner = a_runner()
    hidden = runner.run(a_batch())
    assert int(runner.logits(hidden)[0].argmax()) == 256 + ord("b")
    segments = (
        Segment(spans=((8, 10),), num_keys=2, row_start=0, row_end=1),
        Segment(spans=((10, 11),), num_keys=1, row_start=0, row_end=1, causal_rows=1),
    )
    follow_up = Batch([256 + 98], [2], [10], Plan(1, segments), [(BlockId(1), BlockId(2))], [0])
    assert int(runner.run(follow_up)[0].argmax()) == END


LATER = Segment(spans=((5, 6),), num_keys=1, row_start=1, row_end=2)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"plan": Plan(2, (LATER,))}, "reads positions"),
        ({"positions": [0, 2]}, "reads positions"),
        ({"slots": [4, 9]}, "reads positions"),
        ({"plan": Plan(2, (Segment(spans=((4, 5),), num_keys=2, row_start=0, row_end=2),))}, "spans 1 slots"),
        ({"slots": [5, 4], "positions": [1, 0], "output_rows": [0], "plan": Plan(2, (LATER,))}, "reads positions"),
    ],
)
def test_a_wrong_plan_is_noticed(changes: dict[str, object], complaint: str) -> None:
    """A missing segment, position or slot never passes for a text."""
    with pytest.raises(AssertionError, match=complaint):
        a_runner().run(a_batch(**changes))
