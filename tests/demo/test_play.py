import asyncio
import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dendrite.cli.main import app
from dendrite.demo.play import Settings, play
from dendrite.engine.errors import RequestError
from dendrite.testing import Script, scripted_engine
from tests.demo.script import GOOD, WORD, loses, wins


async def played(script: Script) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=100)
    settings = Settings.of(word=WORD.lower(), width=4, keep=2, seed=1)
    with scripted_engine(script) as engine:
        found = await play(engine, settings, console, plain=True)
        assert engine.stats().blocks_used == 0
    assert isinstance(console.file, io.StringIO)
    return found, console.file.getvalue()


async def test_the_demo_shows_both_sides_and_what_they_took() -> None:
    """Rules, rounds, the poem with a verdict on each line, the samples, the costs; nothing is left in the engine."""
    found, text = await played(wins)
    assert found
    assert "writes a poem that spells AB" in text
    assert "line 2 of 2 (B)" in text
    poem, _, samples = text.partition("Sampling whole poems")
    assert all(line in poem for line in GOOD)
    assert " keep every rule. The best of them:" in samples
    for name in ("poems that keep every rule", "tokens sampled", "tokens computed", "as separate requests", "seconds"):
        assert name in samples


async def test_a_search_that_fails_says_so_and_what_to_try() -> None:
    """The samples are shown all the same."""
    found, text = await played(loses)
    assert not found
    assert "found no whole poem" in text
    assert "1 of 2 lines is missing: try another --seed, or more tries with --width" in text
    assert "0 of " in text


async def test_cancelling_the_demo_prunes_everything() -> None:
    """As Ctrl-C does, in the middle of a generation."""
    with scripted_engine(wins) as engine:
        settings = Settings.of(word=WORD, width=4, keep=2, seed=1)
        task = asyncio.create_task(play(engine, settings, Console(file=io.StringIO()), plain=True))
        while not engine.stats().blocks_used:  # noqa: ASYNC110 (nothing says when the engine begins)
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.stats().blocks_used == 0


@pytest.mark.parametrize("word", ["", "A", "A B", "É" * 3, "TREE1", "A" * 17])
def test_a_word_that_no_poem_can_spell_is_refused(word: str) -> None:
    """Before a model is loaded."""
    with pytest.raises(RequestError, match="2 to 16 letters"):
        Settings.of(word=word, width=1, keep=1, seed=0)


@pytest.mark.parametrize(
    "arguments, message",
    [(["--word", "A B"], "2 to 16 letters"), (["--model", "no-such-model"], "there is no model 'no-such-model'")],
)
def test_bad_arguments_are_one_line_and_exit_code_1(arguments: list[str], message: str) -> None:
    """On stderr, without a traceback."""
    ran = CliRunner().invoke(app, ["demo", *arguments])
    assert ran.exit_code == 1
    error = ran.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in ran.output


def test_the_demo_finds_a_poem_on_the_real_model(real_model_folder: object) -> None:
    """The command as a user runs it, on a short word, into a pipe: plain lines, exit code 0."""
    ran = CliRunner().invoke(app, ["demo", "--word", "NO", "--width", "8", "--keep", "2"])
    assert ran.exit_code == 0, ran.output
    assert "The search found a poem that keeps every rule" in ran.stdout
    assert "line 2 of 2 (O)" in ran.stdout
    assert "\x1b" not in ran.stdout
