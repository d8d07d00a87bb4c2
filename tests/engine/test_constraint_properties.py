"""Random constraints on random models: whatever ends by itself matches, and company changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

import dendrite as dd
from dendrite.engine.grammars import grammar_of

few = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

LITERALS = st.sampled_from(["a", "tree", " the ", "é", "日本", r"\.", "[0-9]", "[a-f]", "[^x]", "(?:on|off)"])
REPEATS = st.sampled_from(["", "", "?", "{2}", "{1,3}", "+"])


@st.composite
def regexes(draw: st.DrawFn) -> str:
    """Sequences and alternatives of small parts, some of them repeated."""
    parts = [draw(LITERALS) + draw(REPEATS) for _ in range(draw(st.integers(1, 4)))]
    parts = [re.sub(r"^([^\[(\\].+?)([?{+].*)$", r"(?:\1)\2", part) for part in parts]
    return "|".join(["".join(parts), *draw(st.lists(LITERALS, max_size=2))])


SCALARS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -9, "maximum": 99},
        {"type": "string", "maxLength": 3},
        {"enum": ["tree", 3, None]},
        {"const": {"step": [1, "two"]}},
    ]
)


def containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2})
    objects = st.dictionaries(st.sampled_from(["on", "step", "n"]), inner, min_size=1, max_size=2).map(
        lambda fields: {
            "type": "object",
            "properties": fields,
            "required": sorted(fields),
            "additionalProperties": False,
        }
    )
    return st.one_of(arrays, objects, st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}))


SCHEMAS = st.recursive(SCALARS, containers, max_leaves=4)


@pytest.fixture(scope="module")
def tiny(tiny_folder: Callable[[str], Path]) -> Iterator[dd.Engine]:
    """A random model: without a constraint it says nothing sensible."""
    with dd.Engine.load(str(tiny_folder("llama")), dtype="float32") as made:
        yield made
        made.check_integrity()
        assert made.stats().blocks_used == 0


def generated(engine: dd.Engine, constraint: dd.Constraint, *, num: int = 3) -> list[dd.Generation]:
    with engine.root("the tree", seed=5) as root:
        outs = engine.generate(root.fork(num), constraint=constraint, temperature=1.0, max_tokens=48)
        assert all(out.finish_reason in ("stop", "eos", "length") for out in outs)
        return outs


@few
@given(regexes())
def test_every_text_that_ends_matches_its_expression(tiny: dd.Engine, regex: str) -> None:
    """In Python's own reading of it, too."""
    for out in generated(tiny, dd.Constraint(regex=regex)):
        if out.finish_reason != "length":
            assert re.fullmatch(regex, out.text), (regex, out.text)


@few
@given(SCHEMAS)
def test_every_json_that_ends_fits_its_schema(tiny: dd.Engine, schema: dict[str, Any]) -> None:
    """Checked against a small validator of the keywords used here."""
    for out in generated(tiny, dd.Constraint(schema=schema)):
        if out.finish_reason != "length":
            assert fits(json.loads(out.text), schema), (schema, out.text)


@few
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5))
def test_every_text_is_one_of_its_choices(tiny: dd.Engine, choices: list[str]) -> None:
    """Any characters at all: quotes, slashes, newlines, NUL, combining marks."""
    for out in generated(tiny, dd.Constraint(choices=choices)):
        assert out.text in choices or any(choice.startswith(out.text) for choice in choices)
        assert out.finish_reason != "length"


@few
@given(regexes(), st.lists(regexes() | st.none(), max_size=4), st.integers(0, 3))
def test_company_changes_no_token(tiny: dd.Engine, regex: str, others: list[str | None], place: int) -> None:
    """A branch draws the same alone and beside branches with other constraints or none."""
    constraint = dd.Constraint(regex=regex)
    alone = generated(tiny, constraint, num=1)[0]
    with tiny.root("the tree", seed=5) as root:
        (mine,) = root.fork(1)
        company = [mine.fork() if place % 2 else root.fork() for _ in others]
        tickets = [
            tiny.submit(
                [branch], constraint=dd.Constraint(regex=other) if other else None, temperature=1.0, max_tokens=9
            )
            for branch, other in zip(company, others, strict=True)
        ]
        beside = mine.generate(constraint=constraint, temperature=1.0, max_tokens=48)
        for ticket in tickets:
            ticket.wait()
        assert (beside.token_ids, beside.finish_reason) == (alone.token_ids, alone.finish_reason)


@few
@given(regexes(), st.integers(1, 6))
def test_a_text_cut_and_continued_in_forks_still_matches(tiny: dd.Engine, regex: str, cut: int) -> None:
    """Each fork of a half-written text ends it in a way that matches."""
    with tiny.root("the tree", seed=6) as root:
        first = root.generate(constraint=dd.Constraint(regex=regex), temperature=1.0, max_tokens=cut)
        if first.finish_reason != "length":
            return
        for out in tiny.generate(root.fork(3), constraint="continue", temperature=1.0, max_tokens=48):
            if out.finish_reason != "length":
                text = tiny.tokenizer.decode([*first.token_ids, *out.token_ids])
                assert re.fullmatch(regex, text), (regex, text)


@few
@given(regexes())
def test_forced_and_drawn_tokens_are_what_llguidance_accepts(tiny: dd.Engine, regex: str) -> None:
    """The tokens themselves, not only their text, walk through the grammar and end where it accepts."""
    constraint = dd.Constraint(regex=regex)
    vocabulary = tiny.tokenizer.for_grammars(tiny.spec.vocab_size)
    for out in generated(tiny, constraint, num=2):
        matcher = LLMatcher(vocabulary, grammar_of(constraint), log_level=0)
        assert matcher.consume_tokens(list(out.token_ids))
        assert matcher.is_accepting() or out.finish_reason == "length"


def fits(value: object, schema: dict[str, Any]) -> bool:
    """Whether JSON fits a schema of the keywords above."""
    for keyword, check in COMBINED.items():
        if keyword in schema:
            return check(value, schema[keyword])
    return CHECKS[schema["type"]](value, schema)


COMBINED: dict[str, Callable[[Any, Any], bool]] = {
    "anyOf": lambda value, options: any(fits(value, option) for option in options),
    "enum": lambda value, options: value in options,
    "const": lambda value, constant: bool(value == constant),
}
CHECKS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "boolean": lambda value, _: isinstance(value, bool),
    "null": lambda value, _: value is None,
    "integer": lambda value, schema: isinstance(value, int) and schema["minimum"] <= value <= schema["maximum"],
    "string": lambda value, schema: isinstance(value, str) and len(value) <= schema["maxLength"],
    "array": lambda value, schema: (
        isinstance(value, list) and 1 <= len(value) <= 2 and all(fits(item, schema["items"]) for item in value)
    ),
    "object": lambda value, schema: (
        isinstance(value, dict)
        and value.keys() == schema["properties"].keys()
        and all(fits(value[name], inner) for name, inner in schema["properties"].items())
    ),
}
