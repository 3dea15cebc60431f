"""The curve of random reads that `inflash probe` measures, on a disk that something disturbs."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from inflash.pipeline.device import assumed_device
from inflash.tools import probe
from inflash.tools.probe import DEPTHS, SIZES, _curve

FILES = [(Path("neurons"), 1 << 30)]


class Disk:
    """Gives so many bytes a second as reads are large and many, but for the 8 KiB reads with most under way: `disturbed`, one by one."""

    def __init__(self, disturbed: list[float]) -> None:
        self.disturbed, self.asked = disturbed, Counter[tuple[int, int]]()

    def read_rate(self, file: Path, file_bytes: int, size: int, depth: int, seconds: float) -> float:
        self.asked[size, depth] += 1
        if (size, depth) == (8192, DEPTHS[-1]) and self.disturbed:
            return self.disturbed.pop(0)
        return 1e3 * size * depth**0.5

    def curve(self, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], float]:
        monkeypatch.setattr(probe, "read_rate", self.read_rate)
        yardstick = SimpleNamespace(measure=lambda *_: assumed_device().state)
        points, _ = _curve(FILES, yardstick, lambda: None)
        assert all(state == assumed_device().state for *_, state in points)
        return {(size, depth): rate for size, depth, rate, _ in points}


def test_an_undisturbed_curve_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk([])
    assert list(disk.curve(monkeypatch)) == [(size, depth) for size in SIZES for depth in DEPTHS]
    assert set(disk.asked.values()) == {1}


def test_a_point_below_those_of_fewer_and_smaller_reads_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk([3e6, 5e6])
    found = disk.curve(monkeypatch)
    assert found[8192, DEPTHS[-1]] == pytest.approx(1e3 * 8192 * DEPTHS[-1] ** 0.5)
    assert disk.asked.pop((8192, DEPTHS[-1])) == 3 and set(disk.asked.values()) == {1}


def test_a_disk_that_is_like_that_is_believed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk([3e6, 5e6, 4e6, 2e6, 9e9])
    assert disk.curve(monkeypatch)[8192, DEPTHS[-1]] == 5e6
    assert disk.asked[8192, DEPTHS[-1]] == 4
