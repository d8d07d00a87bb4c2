"""Constrained generation through the engine's public surface, over a scripted model and over tiny random ones."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

import dendrite as dd
from dendrite.engine.config import SamplingOptions
from dendrite.testing import scripted_engine
from dendrite.testing.tokenizer import FORCED, OPENING


class Person(BaseModel):
    name: str
    age: int


@dataclass
class Point:
    x: int
    y: int


def reply(text: str) -> str | list[str]:
    """The script: a direction, or a number that counts on, whatever it is asked."""
    return str((int(text[-1]) + 1) % 10) * 30 if text[-1:].isdigit() else [" left or right?", " right or left?"]


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    """An engine whose pool must be whole again at the end."""
    with scripted_engine(reply) as made:
        yield made
        made.check_integrity()


@pytest.fixture(scope="module")
def tiny(tiny_folder: Callable[[str], Path]) -> Iterator[dd.Engine]:
    """A random model with a trained tokenizer: what it says has no meaning, so all sense comes from constraints."""
    with dd.Engine.load(str(tiny_folder("llama")), dtype="float32") as made:
        yield made
        made.check_integrity()
        assert made.stats().blocks_used == 0


COPIES = (0, OPENING, FORCED)
"""The scripted engine's tokenizer has three tokens for each byte."""


def forbidden(chars: str) -> dict[int, float]:
    return {ord(char) + copy: float("-inf") for char in chars for copy in COPIES}


def everything(engine: dd.Engine) -> tuple[int, int]:
    """What a refused call must not change: blocks in use and live branches."""
    stats = engine.stats()
    return stats.blocks_used, stats.branches


# --- what is generated ---------------------------------------------------------------------------------------------


def test_the_model_chooses_among_what_the_constraint_allows(engine: dd.Engine) -> None:
    """Draws follow the model's probabilities within the choices, and the text is a choice to the letter."""
    forks = engine.root("Go").fork(16)
    outs = engine.generate(forks, constraint=dd.Constraint(choices=[" left", " right", " up"]), temperature=1.0)
    assert {out.text for out in outs} == {" left", " right"}
    assert {out.finish_reason for out in outs} == {"stop"}
    assert all(fork.text == "Go" + out.text for fork, out in zip(forks, outs, strict=True))


def test_forced_tokens_cost_no_step(engine: dd.Engine) -> None:
    """Text without alternatives is appended at once: no draw, no row of the model, and all of it is counted."""
    root = engine.root("Go")
    out = root.generate(constraint=dd.Constraint(choices=[" straight on"]))
    assert (out.text, out.finish_reason, out.logprobs) == (" straight on", "stop", ())
    assert out.num_forced == len(out.token_ids) == 12
    stats = engine.stats()
    assert (stats.steps, stats.tokens_sampled, stats.tokens_forced) == (0, 0, 12)
    assert root.generate(max_tokens=1).text == " "  # what was not computed then is computed now
    assert engine.stats().tokens_computed == 15


def test_forced_runs_go_through_the_model_together(engine: dd.Engine) -> None:
    """One step for the drawn letter and the run behind it, not one for each token."""
    out = engine.root("Go").generate(constraint=dd.Constraint(regex=" [lr]-forced-run-[lr]"))
    assert re.fullmatch(" [lr]-forced-run-[lr]", out.text)
    stats = engine.stats()
    assert (stats.steps, stats.tokens_sampled, stats.tokens_forced) == (2, 2, 13)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_fast_forward_the_same_tokens_are_drawn(tiny: dd.Engine, temperature: float) -> None:
    """Only `logprobs` differ: drawn tokens have one each, those before them included."""
    options = SamplingOptions(constraint=dd.Constraint(schema=Person), max_tokens=60, temperature=temperature)
    with tiny.root("the tree", seed=3) as one, tiny.root("the tree", seed=3) as other:
        fast = one.generate(**options)
        options["fast_forward"] = False
        slow = other.generate(**options)
        assert fast.token_ids == slow.token_ids
        assert len(slow.logprobs) == len(slow.token_ids)
        assert fast.num_forced > 0
        assert len(fast.logprobs) == len(fast.token_ids) - fast.num_forced


def test_forced_text_is_what_the_tokenizer_writes(tiny: dd.Engine) -> None:
    """Forced tokens are canonical: the tokenizer's own for that text."""
    text = '{"step by step": ["the tree branches", true]}'
    with tiny.root("the tree") as root:
        out = root.generate(constraint=dd.Constraint(schema={"const": json.loads(text)}))
        assert out.text == text
        assert list(out.token_ids) == tiny.tokenizer.encode(text)


@pytest.mark.parametrize(
    "schema",
    [Person, Person.model_json_schema(), Point, list[int], {"enum": ["a", 1, None]}],
    ids=["model", "dict", "dataclass", "list", "enum"],
)
def test_a_schema_gives_json_that_fits_it(tiny: dd.Engine, schema: type | dict[str, object]) -> None:
    """A random model writes valid JSON, or is cut off at max_tokens."""
    from pydantic import TypeAdapter

    with tiny.root("the tree") as root:
        outs = tiny.generate(
            root.fork(6),
            constraint=dd.Constraint(schema=schema),
            max_tokens=80,
            temperature=1.0,
            logit_bias=dict.fromkeys(tiny.tokenizer.encode('"0]'), 4.0),  # else strings and numbers never end
        )
        done = [json.loads(out.text) for out in outs if out.finish_reason in ("stop", "eos")]
        assert done
        for value in done:
            if not isinstance(schema, dict):
                TypeAdapter(schema).validate_python(value, strict=schema is not Point)


def test_a_type_has_no_properties_but_its_own() -> None:
    """Objects of a type are closed, nested ones too, and a field may be called as a keyword of JSON schema is."""

    class Odd(BaseModel):
        properties: Person
        default: dict[str, int] = {"properties": 1}

    schema = json.loads(dd.Constraint(schema=Odd).source)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Person"]["additionalProperties"] is False
    assert list(schema["properties"]) == ["properties", "default"]
    assert schema["properties"]["default"]["default"] == {"properties": 1}
    assert "additionalProperties" not in dd.Constraint(schema={"type": "object", "properties": {}}).source


def test_a_grammar_is_followed(tiny: dd.Engine) -> None:
    """Lark, with recursion."""
    grammar = 'start: sum\nsum: NUM | "(" sum "+" sum ")"\nNUM: /[0-9]/'
    with tiny.root("the tree") as root:
        outs = tiny.generate(root.fork(8), constraint=dd.Constraint(grammar=grammar), max_tokens=40, temperature=1.0)
        done = [out.text for out in outs if out.finish_reason != "length"]
        assert done
        for text in done:
            while text != "0":
                shorter = re.sub(r"\(\d\+\d\)|[1-9]", "0", text)
                assert shorter != text, text
                text = shorter  # noqa: PLW2901 - until nothing of it is left


@pytest.mark.parametrize("regex", ["(äß|日本|🌳){3}", "[α-ω]{2,5}", "[А-Я]{4}", "é+x"])
def test_unicode_is_matched_by_character(tiny: dd.Engine, regex: str) -> None:
    """Characters of several tokens come whole."""
    with tiny.root("the tree") as root:
        outs = tiny.generate(root.fork(6), constraint=dd.Constraint(regex=regex), max_tokens=30, temperature=1.0)
        for out in outs:
            assert "\ufffd" not in out.text or out.finish_reason == "length"
            assert re.fullmatch(regex, out.text) or out.finish_reason == "length", out


# --- how it ends ---------------------------------------------------------------------------------------------------


def test_the_end_of_text_is_allowed_only_where_the_grammar_accepts(engine: dd.Engine) -> None:
    """The script would end at once; it may only after three digits."""
    with scripted_engine(lambda text: "") as silent:
        out = silent.root("n=").generate(constraint=dd.Constraint(regex=r"\d{3,5}"))
        assert re.fullmatch(r"\d{3}", out.text)
        assert out.finish_reason == "eos"
        out = silent.root("n=").generate(constraint=dd.Constraint(regex=r"\d{3,5}"), ignore_eos=True)
        assert re.fullmatch(r"\d{5}", out.text)
        assert out.finish_reason == "stop"


@pytest.mark.parametrize(
    "options, text, reason",
    [
        ({"max_tokens": 2}, "22", "length"),
        ({"max_tokens": 4}, "2222", "stop"),
        ({"stop": "22"}, "", "stop"),
        ({"min_tokens": 3, "stop_token_ids": [ord("2")]}, "2011", "stop"),  # where 2 may not come, 0 does, then 1
        ({"logit_bias": forbidden("2")}, "0111", "stop"),
        ({"presence_penalty": 2.0, "temperature": 0.0}, "2222", "stop"),
    ],
)
def test_other_options_work_under_a_constraint(
    engine: dd.Engine, options: SamplingOptions, text: str, reason: str
) -> None:
    """Limits, stops, bias and penalties act on what the grammar allows."""
    under = options.copy()
    under["constraint"] = dd.Constraint(regex=r"[0-9]{4}")
    out = engine.root("count 1").generate(**under)
    assert (out.text, out.finish_reason) == (text, reason)


def test_a_stop_string_within_a_forced_run_cuts_there(engine: dd.Engine) -> None:
    """The branch ends before the stop, and goes on from there."""
    root = engine.root("Go")
    out = root.generate(constraint=dd.Constraint(regex=" [lr]: one; two"), stop=";")
    assert re.fullmatch(" [lr]: one", out.text)
    assert root.text == "Go" + out.text


def test_a_dead_end_ends_its_branch_alone(engine: dd.Engine) -> None:
    """Bias forbids what the grammar demands on one call's branches; its company goes on."""
    a, b = engine.root("count 1").fork(2)
    stuck, free = asyncio.run(_both(a, b, forbidden("0123456789")))
    assert (stuck.text, stuck.finish_reason) == (" ", "constraint")
    assert isinstance(stuck.error, dd.ConstraintError)
    assert "logit_bias" in str(stuck.error)
    assert (free.finish_reason, free.error) == ("stop", None)
    assert a.status == b.status == "idle"


async def _both(a: dd.Branch, b: dd.Branch, bias: dict[int, float]) -> tuple[dd.Generation, dd.Generation]:
    constraint = dd.Constraint(regex=r" [0-9]{2}")
    return await asyncio.gather(a.agenerate(constraint=constraint, logit_bias=bias), b.agenerate(constraint=constraint))


def test_a_limit_at_run_time_ends_the_branch_with_its_reason(engine: dd.Engine) -> None:
    """A group call returns the others' texts; llguidance's reason is in the error."""
    outs = engine.generate(
        engine.root("Go").fork(2),
        constraint=dd.Constraint(grammar=r'start: "a" /[^\s\S]/'),
    )
    assert [out.finish_reason for out in outs] == ["constraint"] * 2
    assert all("NoExtension" in str(out.error) for out in outs)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, match",
    [
        ({}, "exactly|one of schema"),
        ({"regex": "a", "choices": ["b"]}, "one of schema"),
        ({"choices": []}, "nothing to choose"),
        ({"choices": "ab"}, "list of texts"),
        ({"choices": ["a", ""]}, r"choices\[1\]"),
        ({"choices": ["\ud800"]}, "surrogates"),
        ({"regex": 3}, "string"),
        ({"schema": {"x": object()}}, "no JSON"),
        ({"schema": [1]}, "dict"),
        ({"schema": Iterator}, "no JSON schema"),
    ],
)
def test_a_constraint_that_says_nothing_is_refused_when_it_is_made(given: dict[str, object], match: str) -> None:
    """The message names what is wrong."""
    make: Callable[..., object] = dd.Constraint
    with pytest.raises(dd.ConstraintError, match=match):
        make(**given)


@pytest.mark.parametrize(
    "constraint, match",
    [
        (dd.Constraint(regex="("), "unclosed group"),
        (dd.Constraint(regex=r"a(?=b)"), "look-around"),
        (dd.Constraint(regex=r"[^\s\S]"), "no text at all"),
        (dd.Constraint(grammar="start: foo"), "unknown name"),
        (dd.Constraint(grammar="nope"), "Expected token"),
        (dd.Constraint(schema={"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (dd.Constraint(schema={"type": "array", "uniqueItems": True}), "uniqueItems"),
        (dd.Constraint(schema={"enum": []}), "empty"),
    ],
    ids=str,
)
def test_a_grammar_that_cannot_be_compiled_is_refused_before_anything_runs(
    engine: dd.Engine, constraint: dd.Constraint, match: str
) -> None:
    """Llguidance's message comes with it, in every front, and nothing was changed."""
    root = engine.root("Go")
    before = everything(engine), engine.stats().steps, root.token_ids
    with pytest.raises(dd.ConstraintError, match=match):
        root.generate(constraint=constraint)
    with pytest.raises(dd.ConstraintError, match=match):
        asyncio.run(root.agenerate(constraint=constraint))
    with pytest.raises(dd.ConstraintError, match=match):
        root.stream(constraint=constraint)
    assert (everything(engine), engine.stats().steps, root.token_ids) == before


@pytest.mark.parametrize("value", ["[0-9]+", ["a", "b"], {"type": "string"}, Person])
def test_a_bare_value_is_refused_with_a_hint(engine: dd.Engine, value: object) -> None:
    """A string could be an expression or a grammar, so a Constraint says which."""
    options: dict[str, object] = {"constraint": value}
    generate: Callable[..., object] = engine.root("Go").generate
    with pytest.raises(dd.RequestError, match=r"dd\.Constraint\("):
        generate(**options)


def test_a_huge_grammar_is_refused_or_runs(engine: dd.Engine) -> None:
    """Twenty thousand choices run; a grammar beyond llguidance's limits says so."""
    many = dd.Constraint(choices=[f" move {first} to {second}" for first in range(200) for second in range(100)])
    out = engine.root("Go").generate(constraint=many)
    assert re.fullmatch(r" move \d+ to \d+", out.text)
    beyond = [
        dd.Constraint(regex="|".join(f"w{number}x*" for number in range(100_000))),
        dd.Constraint(regex="x" * 10**7),
    ]
    for constraint in beyond:
        with pytest.raises(dd.ConstraintError, match=r"too big|10000000 characters"):
            engine.root("Go").generate(constraint=constraint)


# --- the guide and the branch --------------------------------------------------------------------------------------


def test_a_text_cut_off_goes_on_in_every_fork(engine: dd.Engine) -> None:
    """The guide forks with the branch: each child finishes the same half-written text, in its own way."""
    root = engine.root("Go")
    first = root.generate(constraint=dd.Constraint(regex=r"<[lr]{2}><[lr]{3}>"), max_tokens=3, temperature=1.0)
    assert first.finish_reason == "length"
    forks = root.fork(12)
    outs = engine.generate(forks, constraint="continue", temperature=1.0)
    assert all(re.fullmatch(r"<[lr]{2}><[lr]{3}>", first.text + out.text) for out in outs)
    assert len({out.text for out in outs}) > 2
    again = root.generate(constraint="continue", max_tokens=2)
    assert again.finish_reason == "length"
    assert root.generate(constraint="continue").text.endswith(">")


@pytest.mark.parametrize("spoil", ["nothing", "append", "at", "stop", "free"])
def test_there_must_be_something_to_continue(engine: dd.Engine, spoil: str) -> None:
    """Text that the grammar has not seen ends its rule over the branch."""
    root = engine.root("Go")
    if spoil != "nothing":
        root.generate(
            constraint=dd.Constraint(regex="[lr]+"), max_tokens=4, stop="zz" if spoil != "stop" else ["l", "r"]
        )
    if spoil == "append":
        root.append(" and")
    elif spoil == "at":
        root = root.fork(1, at=3)[0]
    elif spoil == "free":
        root.generate(max_tokens=1)
    with pytest.raises(dd.ConstraintError, match="continue"):
        root.generate(constraint="continue")
    assert root.status == "idle"


def test_a_cancelled_call_takes_forced_tokens_back(engine: dd.Engine) -> None:
    """Cancelling the task leaves each branch as it was, forced tokens included."""

    async def cancelled(branch: dd.Branch) -> None:
        constraint = dd.Constraint(regex="forced prefix [a-z]{4000}")
        task = asyncio.create_task(branch.agenerate(constraint=constraint, max_tokens=5000))
        while branch.num_tokens < 40:  # noqa: ASYNC110 - a branch has no event for a length
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    root = engine.root("Go")
    before = root.token_ids
    asyncio.run(cancelled(root))
    assert (root.token_ids, root.status) == (before, "idle")
    assert root.generate(max_tokens=1).token_ids


def test_a_closed_stream_keeps_what_it_showed(engine: dd.Engine) -> None:
    """Closing ends the generation; the branch keeps its text and is free again."""
    root = engine.root("Go")
    stream = root.stream(constraint=dd.Constraint(regex="forced prefix [lr]{3000}"), max_tokens=4000)
    assert next(stream) == "forced prefix "
    next(stream)
    stream.close()
    assert root.status == "idle"
    assert re.fullmatch("Goforced prefix [lr]+", root.text)


async def test_a_stream_shows_forced_text_in_its_place() -> None:
    """Pieces joined are the text, and come before the end."""
    with scripted_engine(reply) as engine:
        root = engine.root("Go")
        constraint = dd.Constraint(regex="<<[lr]{3}>>")
        pieces = [piece async for piece in root.astream(constraint=constraint)]
        assert re.fullmatch("<<[lr]{3}>>", "".join(pieces))
        assert pieces[0] == "<<"
        assert root.text == "Go" + "".join(pieces)


def test_what_cannot_fit_is_refused_and_leaves_nothing(tiny: dd.Engine) -> None:
    """OutOfBlocks comes before forced tokens are appended."""
    with scripted_engine(reply, num_blocks=8) as engine:
        root = engine.root("Go")
        with pytest.raises(dd.OutOfBlocks):
            root.generate(constraint=dd.Constraint(regex="forced[lr]{200}"), max_tokens=200)
        assert (root.text, root.status, engine.stats().blocks_used) == ("Go", "idle", 0)
        assert root.generate(constraint=dd.Constraint(regex="forced[lr]{4}"), max_tokens=12).finish_reason == "stop"
        engine.check_integrity()


def test_a_hundred_constraints_at_once(tiny: dd.Engine) -> None:
    """Concurrent calls with constraints of their own keep apart, and leave nothing behind."""

    async def run() -> list[dd.Generation]:
        with tiny.root("the tree") as root:
            forks = root.fork(100)
            return await asyncio.gather(
                *(
                    fork.agenerate(constraint=dd.Constraint(regex=f"{index}: [a-z]{{3}}!"), temperature=1.0)
                    for index, fork in enumerate(forks)
                )
            )

    for index, out in enumerate(asyncio.run(run())):
        assert re.fullmatch(f"{index}: [a-z]{{3}}!", out.text)
