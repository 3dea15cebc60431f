"""`inflash bench plan`: a plan is run in a process of its own, and what it took stands beside what it was to take."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_stores import synthetic_store
from tiny_models import BUFFERED

from inflash.errors import InflashError
from inflash.pipeline.device import assumed_device
from inflash.pipeline.hit_curves import assumed_curves
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.planner import Planner
from inflash.storage.store import Store
from inflash.tools import bench_plan, plan_run, tiny_model, yardstick
from inflash.tools.bench_plan import neighbours
from inflash.tools.cli import main
from inflash.tools.plan_run import OwnRunError, run_in_turns

pytestmark = pytest.mark.filterwarnings(BUFFERED)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return synthetic_store(tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and looks that take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"_ROWS": 256, "_DISK_S": 0.003}.items():
        monkeypatch.setattr(yardstick, name, value)


def test_a_budget_is_predicted_run_and_compared_and_one_too_small_is_reported(
    store: Store, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_an_interruption_loses_no_finished_row(
    store: Store, quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_run, "run_watched", interrupted)
    command = ["bench", "plan", str(store.path), "--budgets", "1,100000", "--batch", "2", "--length", "64"]
    assert main(command) == 130
    (refused,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert "need at least" in refused["refused"]


def test_a_model_that_caches_keep_goes_by_the_steps_of_another(
    store: Store, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is looked at between turns is the tiny model, with its attention streamed where the plan streams something."""
    monkeypatch.setattr(tiny_model, "_STEPS", 2)
    known = replace(assumed_device(), cache_bytes=1 << 30)
    (tmp_path / "device.json").write_text(json.dumps(known.to_json()))
    command = ["bench", "plan", str(store.path), "--budgets", "1,100", "--batch", "1", "--length", "64", "--seconds", "0.1"]
    assert main([*command, "--above-least", "--device", str(tmp_path / "device.json")]) == 0
    for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]:
        plan, looks = row["plan"], row["states"]
        streams = any(plan["streamed_qkv"] + plan["streamed_out"]) or plan["streamed_head"]
        assert streams == (row["budget"] == 1)
        assert len({look["cached_step_s"]["1"] for look in looks}) == len(looks)
        assert (len({look["streamed_step_s"]["1"] for look in looks}) == len(looks)) == streams
        assert len({look["kernel_s"]["1"] for look in looks}) == 1


class Run:
    """A row that says what it was told to, and ends where that ends."""

    def __init__(self, *turns: list[float]) -> None:
        self._turns, self.ended = list(turns), False

    def tell(self, line: str) -> None:
        assert line == "go"

    def end_input(self) -> None:
        self.ended = True

    def answer(self, name: str) -> Any:
        if name == "turn" and not self._turns:
            raise InflashError("ended with 1")
        return [{"total_ms": ms} for ms in self._turns.pop(0)] if name == "turn" else {"prompt_s": 1.0}


def test_a_neighbour_is_as_much_longer_as_its_turns_are_than_those_beside_them() -> None:
    own, other = Run([1, 2, 9], [4, 4], [100, 100, 101], [7.0]), Run([3, 3, 1], [4], [250, 150, 1000], [1.0])
    found = run_in_turns(own, other, seconds=0, most_steps=1000)  # pyright: ignore[reportArgumentType]
    assert other.ended and not own.ended
    assert found["longer"] == 0.5 and found["measured"]["steps"] == 7  # three turns: 1.5, 1 and 2.5 times
    assert found["beside_ms"] == pytest.approx((2 + 4 + 100) / 3) and found["measured"]["total_ms"] == pytest.approx(257 / 3)
    assert found["longer_error"] == pytest.approx(1.25 * statistics.stdev([1.5, 1, 2.5]) / 3**0.5)


def test_the_run_that_ended_is_told_from_the_other() -> None:
    assert run_in_turns(Run([1], [1], [1]), Run([1]), seconds=0, most_steps=9) == {"failed": "ended with 1"}  # pyright: ignore[reportArgumentType]
    with pytest.raises(OwnRunError, match="ended with 1"):
        run_in_turns(Run([1]), Run([1], [1], [1]), seconds=0, most_steps=9)  # pyright: ignore[reportArgumentType]


def test_neighbours_are_other_plans_within_the_same_budget(store: Store) -> None:
    planner = Planner(store, EngineOptions(predictor="planted"), assumed_device(), assumed_curves(store))
    planned = planner.plan(planner.least_bytes(1, 64) + (2 << 20), 1, 64)
    found = list(neighbours(planner, planned))
    names = [name for name, _, _ in found]
    assert {"window of 4 tokens", "a quarter of the depth"} <= set(names) and len(names) == len(set(names))
    assert all(planner.fits(plan, planned.memory_bytes) for _, _, plan in found)
    assert all(changes or plan != planned.plan for _, changes, plan in found)
