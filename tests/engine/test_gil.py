"""Short waits for the interpreter's lock while stepping, and the usual ones afterwards."""

from __future__ import annotations

import sys
import threading

import pytest

from dendrite.engine.gil import SWITCH_INTERVAL, stepping


def test_the_interval_is_short_inside_only() -> None:
    """The switch interval is lowered in the block and restored after it."""
    usual = sys.getswitchinterval()
    with stepping():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
    assert sys.getswitchinterval() == pytest.approx(usual)


def test_an_error_restores_it() -> None:
    """A step that raises leaves nothing behind."""
    usual = sys.getswitchinterval()
    with pytest.raises(ZeroDivisionError), stepping():
        raise ZeroDivisionError
    assert sys.getswitchinterval() == pytest.approx(usual)


def test_two_engines_share_it() -> None:
    """Of two engines that step at once, the one that ends first does not lengthen the other's waits."""
    usual = sys.getswitchinterval()
    entered, leave = threading.Event(), threading.Event()

    def other_engine() -> None:
        with stepping():
            entered.set()
            leave.wait(timeout=10)

    other = threading.Thread(target=other_engine)
    with stepping():
        other.start()
        assert entered.wait(timeout=10)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
    leave.set()
    other.join()
    assert sys.getswitchinterval() == pytest.approx(usual)
