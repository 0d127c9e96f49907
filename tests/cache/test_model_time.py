"""The clock of a model counts what runs inside it, and nothing else."""

import time

import pytest
import torch

from stillroom.cache.model_time import ModelTime


def test_time_inside_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = ModelTime(torch.device("cpu"))
    for _ in range(2):
        with clock.running():
            now[0] += 3
        now[0] += 10
    clock.settle()
    assert clock.seconds == 6


def test_events_of_a_gpu_count_once_they_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = -1

        def record(self) -> None:
            now[0] += 100
            self.at = now[0]

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    now = [0]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = ModelTime(torch.device("cuda"))
    for _ in range(3):
        with clock.running():
            now[0] += 400
    assert clock.seconds == 0
    clock.settle()
    clock.settle()
    assert clock.seconds == pytest.approx(1.5)
