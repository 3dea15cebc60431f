"""`inflash probe` and `inflash plan`: what they measure, keep, print and refuse, on a small model."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import synthetic_store
from tiny_models import BUFFERED

from inflash.pipeline import calibration, device, device_file
from inflash.pipeline.hit_curves import find_curves
from inflash.storage.store import Store
from inflash.tools import probe, probe_layer, probe_model, probe_tiny_model, tiny_model, yardstick
from inflash.tools.cli import main

pytestmark = pytest.mark.filterwarnings(BUFFERED)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and measurements that mean nothing and take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {
        "SIZES": (4096, 16384), "DEPTHS": (1, 4), "BATCHES": (1,), "WIDTHS": {1: (64, 128)}, "_FILE_MIB": 16, "_CURVE_S": 0.02,
        "_KERNEL_S": 0.01, "_BUNDLE_BYTES": 4096,
    }.items():  # fmt: skip
        monkeypatch.setattr(probe, name, value)
    for name, value in {"_STREAMED_BYTES": 1 << 20, "_FETCHED": 64, "_FETCHES": 2}.items():
        monkeypatch.setattr(probe_layer, name, value)
    for name, value in {"_WIDTH": 256, "_LAYERS": 2, "_TURNS": 1, "_TURN_STEPS": 2, "_SHARES": np.array([0.7])}.items():
        monkeypatch.setattr(probe_model, name, value)
    monkeypatch.setattr(probe_tiny_model, "_TURNS", 1)
    monkeypatch.setattr(tiny_model, "_STEPS", 2)
    for name, value in {"_ROWS": 256, "_DISK_S": 0.003, "_PLACINGS": 2}.items():
        monkeypatch.setattr(yardstick, name, value)
    monkeypatch.setattr(calibration, "TOKENS", 128)


def test_a_machine_is_measured_and_a_plan_says_what_it_is_made_from(
    store: Store, quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["plan", str(store.path), "--memory", "400MiB", "--json", "--length", "64"]
    assert main(command) == 0
    before = json.loads(capsys.readouterr().out)
    assert any("rates are assumed" in note for note in before["notes"]) and any("hit curves" in note for note in before["notes"])
    assert main(["probe", str(store.path), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert [(point["size"], point["depth"]) for point in measured["read_curve"]] == [
        (s, d) for s in (4096, 16384) for d in (1, 4)
    ]
    assert measured["kernels"].keys() == set(device.KERNELS)
    assert not [entry for entry in store.path.parent.iterdir() if entry != store.path]
    assert main([*command, "--calibrate"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["notes"] == []
    assert find_curves(store, "planted").prefetch == "planted-ahead"
    keys = ("io_wait_ms", "memory_ms", "compute_ms", "total_ms")
    assert document["predicted"].keys() == set(keys) and document["predicted"]["total_ms"] > 0
    assert document["least_bytes"] <= document["used_bytes"] <= document["memory_bytes"] == 400 << 20
    totals = [point["total_ms"] for point in document["curve"]]
    assert all(after <= before * 1.001 for before, after in pairwise(totals))
    monkeypatch.setattr(device_file, "__version__", "another")
    assert main([*command]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith("rates were measured with something else: inflash (was 0.1.0, is another); run inflash probe")


def test_a_disk_that_is_held_down_is_told_by_the_probe_and_by_plans_that_go_by_it(
    store: Store, quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "DEPTHS", (1, 64))
    monkeypatch.setattr(probe, "read_rate", lambda file, file_bytes, size, depth, seconds: 2e7)
    kept = tmp_path / "device.json"
    assert main(["probe", str(store.path), "-o", str(kept)]) == 0
    told = r"64 reads of 4 KiB under way got \d+ MB/s where one got \d+: its provider, a cgroup or another program"
    assert re.search(f"Note: {told}.*\nPlans and predictions are for that", capsys.readouterr().out)
    assert main(["plan", str(store.path), "--memory", "400MiB", "--length", "64", "--json", "--device", str(kept)]) == 0
    assert any(re.match(f"when the disk was measured, {told}", note) for note in json.loads(capsys.readouterr().out)["notes"])


def test_a_plan_in_words_and_as_a_picture(store: Store, quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "budgets.png"
    assert main(["plan", str(store.path), "--memory", "auto", "--batch", "2", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "the least that would do is" in out and "I/O wait ms" in out and "| KV cache" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "plan: expected --memory BYTES"),
        (["--memory", "50MiB"], "1 x 512 tokens need at least"),
        (["--memory", "1GiB", "--length", "99999"], "has 512 positions, found 99999"),
        (["--memory", "1GiB", "--device", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--memory", "much"], "expected bytes such as 7GiB"),
    ],
)
def test_bad_input_is_one_sentence(
    store: Store, quick: None, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    try:
        assert main(["plan", str(store.path), *flags]) == 2
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err
