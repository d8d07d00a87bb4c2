"""How commands speak: results on stdout, everything else on stderr, one line for an error that is the user's to fix."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from dendrite.engine.errors import DendriteError

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""


@contextmanager
def errors_shown() -> Iterator[None]:
    """Turn the package's own errors into one line on stderr and exit code 1, and Ctrl-C into exit code 130."""
    try:
        yield
    except DendriteError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from error


def megabytes(num_bytes: int) -> str:
    """Bytes for people: `269 MB`."""
    return f"{num_bytes / 1e6:,.0f} MB"
