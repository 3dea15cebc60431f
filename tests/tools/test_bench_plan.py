"""`inflash bench plan`: a plan is run in a process of its own, and what it took stands beside what it was to take."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_stores import synthetic_store
from tiny_models import BUFFERED

from inflash.pipeline.device import assumed_device
from inflash.pipeline.hit_curves import assumed_curves
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.planner import Planner
from inflash.storage.store import Store
from inflash.tools import bench_plan, yardstick
from inflash.tools.bench_plan import neighbours
from inflash.tools.cli import main

pytestmark = pytest.mark.filterwarnings(BUFFERED)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(tmp_path_factory.mktemp("planted") / "store")


def test_a_budget_is_predicted_run_and_compared_and_one_too_small_is_reported(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"_ROWS": 256, "_DISK_S": 0.003}.items():
        monkeypatch.setattr(yardstick, name, value)
    command = ["bench", "plan", str(store.path), "--budgets", "50", "--batch", "2", "--length", "64", "--seconds", "0.1"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    (refused,) = json.loads(lines[-1])["rows"]
    assert "need at least" in refused["refused"] and any(line.startswith("batch 2, 50%") for line in lines)
    one = [("nothing read across", {"merge_gap": 0})]
    monkeypatch.setattr(bench_plan, "neighbours", lambda _, planned: [(n, {}, replace(planned.plan, **c)) for n, c in one])
    assert main([*command, "--above-least", "--grid", "--plot", str(tmp_path / "budgets.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    (row,) = document["rows"]
    (other,) = row["grid"]
    assert other["measured"]["total_ms"] > 0 < other["beside_ms"] and other["measured"]["steps"] >= 6
    assert other["longer"] > -1 and other["longer_error"] > 0
    assert f"of the plan itself, {other['longer']:+.0%}, give or take" in "\n".join(lines)
    assert row["measured"]["total_ms"] > 0 and row["measured"]["steps"] >= 2
    assert len(row["states"]) >= 2 and all(state["random_bytes_per_s"] > 0 for state in row["states"])
    assert row["error"] == pytest.approx(row["predicted"]["total_ms"] / row["measured"]["total_ms"] - 1)
    assert document["worst_error"] == document["median_error"] == abs(row["error"])
    assert row["peak_bytes"] is None or row["peak_bytes"] <= row["memory_bytes"] + (64 << 20)
    assert (tmp_path / "budgets.png").exists()


def test_neighbours_are_other_plans_within_the_same_budget(store: Store) -> None:
    planner = Planner(store, EngineOptions(predictor="planted"), assumed_device(), assumed_curves(store))
    planned = planner.plan(planner.least_bytes(1, 64) + (2 << 20), 1, 64)
    found = list(neighbours(planner, planned))
    names = [name for name, _, _ in found]
    assert {"window of 4 tokens", "a quarter of the depth"} <= set(names) and len(names) == len(set(names))
    assert all(planner.fits(plan, planned.memory_bytes) for _, _, plan in found)
    assert all(changes or plan != planned.plan for _, changes, plan in found)
