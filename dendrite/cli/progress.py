"""What a long command does just now: one line on stderr that rewrites itself, or plain lines where that is a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Gives a function that shows what runs now; a terminal's line is gone at the end."""
    if not sys.stderr.isatty():
        yield _plain
        return
    from rich.console import Console

    with Console(stderr=True).status("starting", refresh_per_second=4) as status:
        yield status.update


def _plain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
