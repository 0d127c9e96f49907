"""SIGTERM within a job is Ctrl-C; outside of it, it is what it was."""

import os
import signal

import pytest

from stillroom.tools.ending import ends_when_told


def work(cleaned: list[str]) -> None:
    """Work that is told to end, and told again while it cleans up."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 10)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        cleaned.append("to the end")


def test_sigterm_interrupts_once_and_only_within() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned: list[str] = []
    with pytest.raises(KeyboardInterrupt), ends_when_told():
        work(cleaned)
    assert cleaned == ["to the end"]
    assert signal.getsignal(signal.SIGTERM) is before
