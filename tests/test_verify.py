"""The oracle itself: it calls a sound engine exact on every set-up, and a broken one broken."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dendrite.cli.main import app
from dendrite.engine.errors import RequestError
from dendrite.engine.models import LoadedModel, load_model
from dendrite.engine.text import Tokenizer
from dendrite.verify import Report, Row, cases, oracle, verify
from dendrite.verify.judge import TOLERANCE, Expected, judge_prefill, judge_tokens, judge_worst
from dendrite.verify.prompts import Prompt, make_prompts
from dendrite.verify.reference import Reference
from dendrite.verify.subject import Setup, opened

GROUPS = ["tokens", "prefill", "greedy", "fork", "company", "cache", "score", "set-up"]


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return verify(str(folder))


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    """Return what plain Transformers does with one prompt of 37 tokens."""
    reference = Reference(folder)
    prompt = Prompt("37 tokens", tuple(token * 7 % 300 for token in range(37)))
    [tokens] = reference.greedy([prompt.token_ids], 48)
    logits = reference.logits([*prompt.token_ids, *tokens[:-1]], 48)
    return Expected(prompt, tuple(tokens), logits, logits.double)


def badly_broken(name: str, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load a model of which one layer computes nothing."""
    loaded = load_model(name, dtype=dtype, device=device)
    with torch.no_grad():
        loaded.model.get_decoder().layers[1].mlp.down_proj.weight.zero_()
    return loaded


def broken(name: str, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load a model of which one weight is a little off."""
    loaded = load_model(name, dtype=dtype, device=device)
    with torch.no_grad():
        loaded.model.get_decoder().layers[1].mlp.down_proj.weight[3, 5] += 0.1
    return loaded


def test_sound_engine_is_exact(report: Report) -> None:
    """Every group of cases runs on a tiny model, and no case is a miss."""
    assert report.ok, report.misses
    assert list(dict.fromkeys(row.group for row in report.rows)) == GROUPS


def test_every_prompt_is_decoded_to_the_end(report: Report) -> None:
    """A dozen prompts and more are compared over 64 tokens each."""
    totals = [row.tokens_total for row in report.rows if row.group == "greedy"]
    assert len(totals) >= 12
    assert set(totals) == {64}


@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
@pytest.mark.parametrize("prefill_chunk", [1, 7, 64, 512])
def test_no_setup_changes_a_token(folder: Path, expected: Expected, block_size: int, prefill_chunk: int) -> None:
    """Forks at every offset, alone and in company, go on as plain Transformers does, at any size of block and chunk."""
    with opened(str(folder), dtype="float32", setup=Setup(block_size, prefill_chunk)) as subject:
        rows = [*cases.greedy(subject, expected), *cases.forks(subject, expected, num_tokens=4, every=True)]
        rows += cases.cache(subject, expected, num_tokens=4)
        rows += cases.company(subject, [expected], num_tokens=8)
        subject.engine.check_integrity()
        assert subject.engine.stats().blocks_used == 0
    assert [row for row in rows if row.verdict == "miss"] == []


def test_broken_engine_is_a_miss(folder: Path) -> None:
    """One weight that is a little off shows in the logits of every prompt."""
    report = verify(str(folder), load=broken)
    assert not report.ok
    assert {row.verdict for row in report.rows if row.group == "greedy"} == {"miss"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_held_to_what_transformers_loses(folder: Path, dtype: str) -> None:
    """A sound engine passes, and a broken one does not."""
    assert verify(str(folder), dtype=dtype).ok
    assert not verify(str(folder), dtype=dtype, load=badly_broken).ok


def test_other_dtypes_are_refused(folder: Path) -> None:
    """A dtype that nothing is promised for is an error that names those that are."""
    with pytest.raises(RequestError, match="float32, bfloat16 or float16"):
        verify(str(folder), dtype="int4")


def test_command_prints_json(folder: Path) -> None:
    """`--json` prints the whole report on stdout and nothing else; progress goes to stderr."""
    result = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ok"] is True
    assert len(report["pins"]["weights_sha256"]) == len(report["pins"]["tokenizer_sha256"]) == 64
    assert report["pins"]["transformers"]
    assert set(report["tolerances"]) == {"tokens", "logits", "scores"}
    assert {row["verdict"] for row in report["rows"]} <= {"ok", "rounding"}


def test_command_fails_on_a_miss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says what is not exact, and the exit code is not zero."""
    monkeypatch.setattr(oracle, "verify", partial(verify, load=broken))
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1
    assert "NOT EXACT" in result.stdout
    assert result.stdout.index("logits allowed: 0.0001") < result.stdout.index("prefill")
    assert "miss" in result.stdout


def test_command_names_an_unknown_model() -> None:
    """A model that does not exist is one line on stderr."""
    result = CliRunner().invoke(app, ["verify", "no-such-model"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: there is no model 'no-such-model'")


@pytest.mark.timeout(1800)
def test_real_model_is_exact(real_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On short prompts of every kind: the command takes longer ones too, more tokens, three set-ups, and minutes."""

    def short(tokenizer: Tokenizer, *, room: int, has_template: bool) -> list[Prompt]:
        prompts = make_prompts(tokenizer, room=room, has_template=has_template)
        return [prompt for prompt in prompts if len(prompt.token_ids) <= 140]

    monkeypatch.setattr(oracle, "NUM_TOKENS", 16)
    monkeypatch.setattr(oracle, "SETUPS", oracle.SETUPS[:1])
    monkeypatch.setattr(oracle, "make_prompts", short)
    report = verify(str(real_model_folder))
    assert report.ok, report.misses


# --- verdicts ---------------------------------------------------------------------------------------------------------


def small_expected(logits: list[list[float]], exact: list[list[float]] | None = None) -> Expected:
    table = torch.tensor(logits)
    tokens = tuple(int(token) for token in table.argmax(-1))
    truth = torch.tensor(exact, dtype=torch.float64) if exact is not None else table.double()
    return Expected(Prompt("small", (0,)), tokens, table, lambda: truth)


def test_equal_tokens_are_ok() -> None:
    """Equal tokens and close logits are no matter."""
    expected = small_expected([[1.0, 2.0], [2.0, 1.0]])
    row = judge_tokens("g", "c", [1, 0], expected, logits=expected.logits + TOLERANCE / 2)
    assert (row.verdict, row.tokens_equal, row.tokens_total) == ("ok", 2, 2)


def test_other_token_is_a_miss() -> None:
    """A token that the reference puts behind its own is a miss, and so is all that follows."""
    row = judge_tokens("g", "c", [1, 1, 1], small_expected([[1.0, 2.0], [2.0, 1.999], [1.0, 2.0]]))
    assert (row.verdict, row.tokens_equal) == ("miss", 1)
    assert "token 1: 1 is 1.0e-03 behind 0" in row.note


def test_tie_is_named_and_not_counted_as_equal() -> None:
    """Where the reference itself cannot tell two tokens apart, the other one is rounding."""
    row = judge_tokens("g", "c", [1, 1], small_expected([[1.0, 2.0], [2.0, 2.0 - 1e-6]]))
    assert (row.verdict, row.tokens_equal) == ("rounding", 1)


def test_float64_decides_above_the_tolerance() -> None:
    """Logits further off than the tolerance pass as rounding only if they are as close to float64."""
    expected = small_expected([[1.0, 2.0]], exact=[[1.0, 2.0003]])
    assert judge_prefill("g", "c", torch.tensor([[1.0, 2.0005]]), expected).verdict == "rounding"
    assert judge_prefill("g", "c", torch.tensor([[1.0, 2.0015]]), expected).verdict == "miss"


def test_logits_that_are_no_numbers_are_a_miss() -> None:
    """A NaN is no small difference."""
    row = judge_prefill("g", "c", torch.tensor([[1.0, float("nan")]]), small_expected([[1.0, 2.0]]))
    assert row.verdict == "miss"


def test_logprobs_are_compared_where_there_are_no_logits() -> None:
    """In a batch the log-probabilities of the tokens stand for their logits."""
    expected = small_expected([[1.0, 2.0]])
    theirs = float(expected.logits.log_softmax(-1)[0, 1])
    assert judge_tokens("g", "c", [1], expected, logprobs=[theirs]).verdict == "ok"
    assert judge_tokens("g", "c", [1], expected, logprobs=[theirs - 1e-3]).verdict == "miss"


def test_worst_of_many_rows_is_told() -> None:
    """Tokens add up; the verdict is that of the worst row, which is named."""
    rows = [Row("g", "a", 4, 4, 1e-6, 1e-4, "ok"), Row("g", "b", 1, 4, 2e-6, 1e-4, "miss", "why")]
    worst = judge_worst("g", "all", rows)
    assert (worst.tokens_equal, worst.tokens_total, worst.max_difference, worst.verdict) == (5, 8, 2e-6, "miss")
    assert worst.note == "b: why"


def test_empty_report_is_not_ok() -> None:
    """Nothing compared is nothing shown."""
    assert not Report("m", "float32", (), 0.0).ok
