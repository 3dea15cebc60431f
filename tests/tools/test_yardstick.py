"""The fixed pieces of work that say how fast a machine is."""

from dataclasses import asdict
from pathlib import Path

import pytest
from synthetic_stores import synthetic_store

from inflash.tools import yardstick
from inflash.tools.yardstick import Yardstick, neuron_files


def test_what_is_asked_for_is_measured_again_and_the_rest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_ROWS": 256, "_DISK_S": 0.003, "_PLACINGS": 2, "_SETTLING_S": 0.0}.items():
        monkeypatch.setattr(yardstick, name, value)
    measuring = Yardstick(neuron_files(synthetic_store(tmp_path / "store")), (1, 8))
    first = measuring.measure()
    assert set(first.kernel_s) == {1, 8} and not first.cached_step_s and not first.streamed_step_s
    assert min(first.processor_s, first.random_bytes_per_s, first.stream_bytes_per_s, *first.kernel_s.values()) > 0
    second = asdict(measuring.measure("processor_s", "random_bytes_per_s"))
    changed = {name for name, value in asdict(first).items() if second[name] != value}
    assert changed == {"processor_s", "random_bytes_per_s"}
    assert measuring.measure("kernel_s").random_bytes_per_s == second["random_bytes_per_s"], "as it was the last time"
    assert measuring.measure().stream_bytes_per_s != first.stream_bytes_per_s
