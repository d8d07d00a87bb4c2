"""Pages that describe what the code defines say the same as the code."""

import ast
import inspect
import re
from pathlib import Path

from dendrite.engine import errors
from dendrite.engine.config import SamplingParams

DOCS = Path(__file__).parent.parent.parent / "docs"
OPTION = re.compile(r"^\| `(\w+)` \| (.+?) \| ", flags=re.MULTILINE)
ERROR = re.compile(r"^[│ ]*[├└]── ([A-Z]\w+)", flags=re.MULTILINE)


def test_sampling_page_names_every_option_with_its_default() -> None:
    """The table of docs/sampling.md has the options of `SamplingParams`, in order, with their defaults."""
    table = OPTION.findall((DOCS / "sampling.md").read_text(encoding="utf-8"))
    defaults = SamplingParams.of().model_dump()
    assert {name: ast.literal_eval(value) for name, value in table} == defaults
    assert [name for name, _ in table] == list(defaults)


def test_architecture_page_draws_every_error() -> None:
    """The tree in docs/architecture.md holds every error of the package."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert {"DendriteError", *ERROR.findall(page)} == defined
