"""The Python code of the README and of every page under docs/ runs as it is written, on the real model.

The blocks of a page run in order and share their names, as a reader would type them. A block under the comment
`<!-- later: WHAT -->` shows something that is not built yet: it is reported as skipped, with WHAT.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import dendrite as dd

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- later: (?P<later>.+?) -->\n)?```python\n(?P<code>.*?)^```$", flags=re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, and why it does not run yet, if it does not."""

    page: Path
    line: int
    code: str
    later: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["code"], match["later"])
        for match in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUNNABLE = [page for page in PAGES if any(block.page == page and not block.later for block in BLOCKS)]
LATER = [block for block in BLOCKS if block.later]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of the page runs, in order, in an empty folder."""
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    try:
        for block in BLOCKS:
            if block.page == page and not block.later:
                padded = "\n" * (block.line - 1) + block.code
                exec(compile(padded, str(page), "exec"), vars(module))  # noqa: S102 (our own pages)
    finally:
        for value in vars(module).values():
            if isinstance(value, dd.Engine):
                value.close()


@pytest.mark.parametrize("block", LATER, ids=lambda block: block.name)
def test_block_comes_later(block: Block) -> None:
    """A block that cannot run yet is still Python, and says what it waits for."""
    compile(block.code, block.name, "exec")
    pytest.skip(f"comes later: {block.later}")


def test_every_python_block_is_found() -> None:
    """No block escapes the pattern above: fences are not indented and name nothing but the language."""
    for page in PAGES:
        fences = len(
            re.findall(r"^\s*(?:```|~~~)\s*\{?\.?(?:python|py)\b", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        )
        assert fences == len(blocks_of(page)), page
