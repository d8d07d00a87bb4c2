import io

import pytest

from dendrite.engine.progress import ConsoleReport


def test_the_console_report_writes_plain_lines_to_files(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal, a step is a line when it starts and one when it ends; stdout stays clean."""
    report = ConsoleReport()
    with report.track("converting", 12_000_000) as done:
        done(6_000_000)
    report.say("[not markup] ready")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["converting (12 MB) ...", "converting: done", "[not markup] ready"]


def test_the_console_report_draws_a_bar_on_a_terminal() -> None:
    """On a terminal a step is one bar that ends full."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ConsoleReport(stream).track("converting", 12_000_000) as done:
        done(99_000_000)
    assert "converting" in stream.getvalue()
    assert "12.0/12.0 MB" in stream.getvalue()
