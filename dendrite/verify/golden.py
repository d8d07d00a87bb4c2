"""Golden files: what the engine gave for a pinned model once, for machines and versions to come.

A file holds a model's name, what it was made with (`Pins`), and for a few prompts the tokens, the largest logits after
the prompt, the greedy continuation with the margin of each token, and scores. Hashes and token ids are compared
exactly, numbers within the file's own tolerance; another greedy token is let through where the recorded margin is
smaller than twice that, and ends the comparison of that prompt's tokens.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dendrite.engine.errors import ModelError, RequestError
from dendrite.engine.models import load_model
from dendrite.engine.registry import ModelStore
from dendrite.engine.text import Tokenizer
from dendrite.verify.cases import CHOICES
from dendrite.verify.pins import Pins, pins_of
from dendrite.verify.prompts import CHATS, Prompt, make_prompts
from dendrite.verify.subject import Load, Setup, Subject, opened

PROMPTS = ("plain", "digits", "code", "chat")
NUM_TOKENS = 12
NUM_LARGEST = 5
TOLERANCE = 1e-3
"""Of a float32 logit or a token's log-probability between machines; ten times what is allowed on one of them."""
DIGITS = 5


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """One prompt and what followed."""

    name: str
    token_ids: list[int]
    largest: list[list[float]]
    """The prompt's last row: token ids and logits, largest first."""
    greedy: list[int]
    margins: list[float]
    """How far each greedy token was ahead of the next best one."""
    scores: list[float]
    """Log-probabilities of the first choices of `cases.CHOICES` after the prompt."""


@dataclass(frozen=True, slots=True)
class Golden:
    """A golden file."""

    model: str
    dtype: str
    tolerance: float
    pins: Pins
    prompts: list[GoldenPrompt]

    def to_json(self) -> str:
        """The file's text, a prompt's list a line."""
        return _Lines().encode(asdict(self)) + "\n"

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read a golden file.

        Raises:
            RequestError: it is none.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            prompts = [GoldenPrompt(**prompt) for prompt in fields.pop("prompts")]
            return cls(**fields | {"pins": Pins(**fields["pins"])}, prompts=prompts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{path} is no golden file ({error}): make one with --update") from error


class _Lines(json.JSONEncoder):
    """Lists of numbers on one line, so that a diff shows which prompt changed."""

    def encode(self, o: object) -> str:
        return "".join(_encoded(o, 0))


def _encoded(value: object, depth: int) -> Iterator[str]:
    pad = "  " * (depth + 1)
    if isinstance(value, Mapping):
        items = [f"{pad}{json.dumps(key)}: {''.join(_encoded(item, depth + 1))}" for key, item in value.items()]
        yield "{\n" + ",\n".join(items) + "\n" + pad[2:] + "}"
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        items = [pad + "".join(_encoded(item, depth + 1)) for item in value]
        yield "[\n" + ",\n".join(items) + "\n" + pad[2:] + "]"
    else:
        yield json.dumps(value)


def measure(name: str, *, load: Load = load_model) -> Golden:
    """What the engine gives now, in float32 on the CPU.

    Args:
        name: a short name, a hub id or a folder.
        load: how the model is loaded; a test gives a broken one.

    Raises:
        ModelError: no such model, or one that the engine refuses.
    """
    folder = ModelStore().locate(name).path
    with opened(name, dtype="float32", setup=Setup(), load=load) as subject:
        tokenizer = subject.engine.tokenizer
        room = subject.engine.spec.context_length - NUM_TOKENS
        prompts = make_prompts(tokenizer, room=room, has_template=_has_template(tokenizer))
        measured = [_measured(subject, prompt) for prompt in prompts if prompt.name in PROMPTS]
    return Golden(name, "float32", TOLERANCE, pins_of(folder), measured)


def _has_template(tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.render(CHATS["chat"])
    except ModelError:
        return False
    return True


def _measured(subject: Subject, prompt: Prompt) -> GoldenPrompt:
    with subject.engine.root(token_ids=prompt.token_ids) as root:
        scores = root.score(CHOICES[:3])
        tokens, logits = subject.greedy(root, NUM_TOKENS)
    top = logits[0].topk(NUM_LARGEST)
    largest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    best = logits.topk(2, -1).values
    return GoldenPrompt(
        name=prompt.name,
        token_ids=list(prompt.token_ids),
        largest=[[token, round(value, DIGITS)] for token, value in largest],
        greedy=tokens,
        margins=[round(margin, DIGITS) for margin in (best[:, 0] - best[:, 1]).tolist()],
        scores=[round(score, DIGITS) for score in scores],
    )


def differences(golden: Golden, now: Golden) -> list[str]:
    """Why the two do not agree; empty if they do. Versions may differ, the model's files may not."""
    found = [
        f"{what}: {before} was recorded, this is {after}"
        for what, before, after in (
            ("weights", golden.pins.weights_sha256, now.pins.weights_sha256),
            ("tokenizer", golden.pins.tokenizer_sha256, now.pins.tokenizer_sha256),
            ("prompts", [each.name for each in golden.prompts], [each.name for each in now.prompts]),
        )
        if before != after
    ]
    if found:
        return found
    for before, after in zip(golden.prompts, now.prompts, strict=True):
        found += (f"{before.name}: {why}" for why in _prompt_differences(before, after, golden.tolerance))
    return found


def _prompt_differences(before: GoldenPrompt, after: GoldenPrompt, tolerance: float) -> Iterator[str]:
    if before.token_ids != after.token_ids:
        yield "the prompt became other tokens"
        return
    logits = {int(token): value for token, value in after.largest}
    for token, value in before.largest[:-1]:  # the last may have changed places with the one that follows
        if not abs(logits.get(int(token), float("inf")) - value) <= tolerance:  # a NaN differs
            yield f"logit of token {int(token)}: {value} was recorded, this is {logits.get(int(token))}"
    for index, (ours, theirs) in enumerate(zip(after.greedy, before.greedy, strict=True)):
        if ours != theirs:
            if before.margins[index] > 2 * tolerance:
                yield f"greedy token {index}: {theirs} was recorded, {before.margins[index]} ahead; this is {ours}"
            break
    yield from _score_differences(before.scores, after.scores, tolerance)


def _score_differences(before: Sequence[float], after: Sequence[float], tolerance: float) -> Iterator[str]:
    for choice, theirs, ours in zip(CHOICES, before, after, strict=False):
        if not abs(ours - theirs) <= tolerance * len(choice):  # a token is a character or more
            yield f"score of {choice!r}: {theirs} was recorded, this is {ours}"


def diff(path: Path, now: Golden) -> str:
    """A unified diff from the file to what is measured now; empty if the text is the same."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = before.splitlines(keepends=True), now.to_json().splitlines(keepends=True)
    return "".join(difflib.unified_diff(*lines, fromfile=str(path), tofile="now", n=1))


def file_for(folder: Path, model: str) -> Path:
    """Where a model's golden file lies."""
    return folder / f"{Path(model).name}.json"
