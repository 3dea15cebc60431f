"""Energy: meters that wrap, meters that nobody may read, and the estimate."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from inflash.tools import energy
from inflash.tools.energy import DRAM_J_PER_BYTE, FLASH_J_PER_BYTE, J_PER_OPERATION, PowerMeter, estimate


def zone(folder: Path, name: str, label: str, energy_uj: int, top_uj: int = 10_000_000) -> Path:
    (folder / name).mkdir(parents=True)
    for file, text in (("name", label), ("energy_uj", str(energy_uj)), ("max_energy_range_uj", str(top_uj))):
        (folder / name / file).write_text(text + "\n")
    return folder / name / "energy_uj"


def test_packages_are_added_up_and_counters_may_wrap(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000), zone(tmp_path, "intel-rapl:1", "package-1", 0)
    memory = zone(tmp_path, "intel-rapl:0:0", "dram", 5)
    zone(tmp_path, "intel-rapl:0:1", "core", 0)
    meter = PowerMeter(tmp_path)
    for values in ((9_500_000, 2_000_000, 1_000_005), (499_999, 2_000_000, 1_500_005)):
        for file, value in zip((first, second, memory), values, strict=True):
            file.write_text(f"{value}\n")
        meter.update()
    now = time.perf_counter_ns()
    assert meter.joules(0, now) == pytest.approx({"package": 0.5 + 1.0 + 2.0, "DRAM": 1.5})
    assert meter.joules(now, now + 1) == pytest.approx({"package": 0, "DRAM": 0})


def test_joules_between_two_moments_are_interpolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((1000, 2000, 4000))
    monkeypatch.setattr(energy, "time", SimpleNamespace(perf_counter_ns=lambda: next(moments)))
    file, meter = zone(tmp_path, "intel-rapl:0", "package-0", 0), PowerMeter(tmp_path)
    for total in (3_000_000, 5_000_000):
        file.write_text(f"{total}\n")
        meter.update()
    assert meter.joules(1500, 3000) == pytest.approx({"package": 1.5 + 1.0})
    assert meter.joules(0, 9000) == pytest.approx({"package": 5.0})


def test_without_meters_there_is_nothing_to_tell(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()  # as for users who may not read them
    for folder in (tmp_path, tmp_path / "missing"):
        meter = PowerMeter(folder)
        meter.update()
        assert meter.joules(0, time.perf_counter_ns()) is None


def test_the_estimate_says_that_it_is_one() -> None:
    found = estimate(flash_bytes=1e9, dram_bytes=2e9, operations=3e9)
    assert found["estimated"] and "lower bound" in found["constants"] and "Horowitz" in found["constants"]
    expected = {"flash": 1e9 * FLASH_J_PER_BYTE, "DRAM": 2e9 * DRAM_J_PER_BYTE, "arithmetic": 3e9 * J_PER_OPERATION}
    assert found["joules"] == pytest.approx(expected) and found["total_joules"] == pytest.approx(sum(expected.values()))
