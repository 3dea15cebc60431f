"""Energy: meters that wrap, meters that nobody may read, and the estimate."""

from pathlib import Path

import pytest

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
    assert meter.joules() == pytest.approx({"package": 0.5 + 1.0 + 2.0, "dram": 1.5})


def test_without_meters_there_is_nothing_to_tell(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()  # as for users who may not read them
    for folder in (tmp_path, tmp_path / "missing"):
        meter = PowerMeter(folder)
        meter.update()
        assert meter.joules() is None


def test_the_estimate_says_that_it_is_one() -> None:
    found = estimate(flash_bytes=1e9, dram_bytes=2e9, operations=3e9)
    assert found["estimated"] and "lower bound" in found["constants"] and "Horowitz" in found["constants"]
    expected = {"flash": 1e9 * FLASH_J_PER_BYTE, "dram": 2e9 * DRAM_J_PER_BYTE, "arithmetic": 3e9 * J_PER_OPERATION}
    assert found["joules"] == pytest.approx(expected) and found["total_joules"] == pytest.approx(sum(expected.values()))
