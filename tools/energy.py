"""Energy of a run: from the processor's own meters where Linux lets them be read, else an estimate that says it is one."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

POWERCAP = Path("/sys/class/powercap")

FLASH_J_PER_BYTE = 1e-9
DRAM_J_PER_BYTE = 160e-12
J_PER_OPERATION = 4.6e-12
SOURCES = (
    "flash 1 nJ a byte (an NVMe drive of 7 W that reads 7 GB/s); DRAM 160 pJ a byte (1.3 nJ for 64 bits) and 4.6 pJ for a float32 "
    "multiplication and addition (45 nm), both from M. Horowitz, Computing's Energy Problem, ISSCC 2014. Idle power, caches, and the "
    "processor's instructions are not in it, so it is a lower bound of the order of magnitude"
)


@dataclass(slots=True)
class _Zone:
    name: str
    file: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0


class PowerMeter:
    """Adds up what the package and DRAM meters count; has to be read more often than they wrap around (minutes)."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._zones: list[_Zone] = []
        self._seen: list[tuple[int, dict[str, float]]] = []
        for zone in sorted(folder.glob("*:*")) if folder.is_dir() else ():
            try:
                name = (zone / "name").read_text().strip()
                if name.startswith("package") or name == "dram":
                    file, top = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())
                    self._zones.append(_Zone(name, file, top, int(file.read_text())))
            except (OSError, ValueError):  # only root may read it on most systems
                continue

        self._keep()

    def update(self) -> None:
        """Reads the meters and keeps what they say."""
        for zone in self._zones:
            now = int(zone.file.read_text())
            zone.total_uj += (now - zone.last_uj) % (zone.range_uj + 1)
            zone.last_uj = now
        self._keep()

    def _keep(self) -> None:
        total: dict[str, float] = {}
        for zone in self._zones:
            name = "DRAM" if zone.name == "dram" else "package"
            total[name] = total.get(name, 0.0) + zone.total_uj / 1e6
        self._seen.append((time.perf_counter_ns(), total))

    def joules(self, begin_ns: int, end_ns: int) -> dict[str, float] | None:
        """By "package" and "DRAM", the whole machine's between two moments; None: nothing can be read here."""
        if not self._zones:
            return None
        times = [at for at, _ in self._seen]
        found = {}
        for name in self._seen[0][1]:
            totals = [total[name] for _, total in self._seen]
            found[name] = float(np.interp(end_ns, times, totals) - np.interp(begin_ns, times, totals))
        return found


def estimate(*, flash_bytes: float, dram_bytes: float, operations: float) -> dict[str, Any]:
    """Joules by where they go, from what was moved and computed.

    Args:
      flash_bytes, dram_bytes: read from each.
      operations: pairs of a multiplication and an addition.
    """
    parts = {
        "flash": flash_bytes * FLASH_J_PER_BYTE,
        "DRAM": dram_bytes * DRAM_J_PER_BYTE,
        "arithmetic": operations * J_PER_OPERATION,
    }
    return {"estimated": True, "joules": parts, "total_joules": sum(parts.values()), "constants": SOURCES}
