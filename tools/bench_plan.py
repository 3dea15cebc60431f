"""`inflash bench plan`: plans for several budgets, run under a memory cgroup of that size, beside what they were predicted to take.

Every run is a process of its own that only follows the plan. Its cgroup may hold the budget and 64 MiB, page cache and shared memory
counted; a run that needs more is ended by the kernel and reported. The plan goes by what was probed; what it is predicted to take, by how
fast the machine is during the run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InflashError
from ..storage.store import Store, open_store
from . import arguments as flags
from .plan import PARTS
from .progress import progress_bar
from .table import table

_TURNS = 20  # of steps between which the machine is looked at, at most
_PART_NAMES = ("I/O wait ms", "memory ms", "compute ms", "total ms")
_HEADER = ["batch", "budget", "MiB", "attention", "neurons", *_PART_NAMES, "error", "peak"]
_WARM_UP = 6  # times as long as what is measured


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.planned_engine import open_planner

    if arguments.plot:
        from .plot_file import check_plot

        check_plot(arguments.plot)
    store, options = open_store(arguments.model), flags.engine_options(arguments)
    planner, notes = open_planner(store, options, arguments.device)
    for note in notes:
        print(f"inflash: warning: {note}", file=sys.stderr)
    runs = [(batch, share) for batch in arguments.batch for share in arguments.budgets]
    results: list[dict[str, Any]] = []
    with (
        _comparison(store, options, planner, arguments) as comparison,
        progress_bar(total=len(runs), desc="measuring", unit=" runs") as bar,
    ):
        try:
            for batch, share in runs:
                results.append(comparison.of_budget(batch, share))
                bar.update()
        finally:  # a run takes a minute: what interrupts one takes none of the others along
            bar.close()
            if results:
                _report(store, results, arguments.plot)
    return 0


@contextmanager
def _comparison(store: Store, options: Any, planner: Any, arguments: argparse.Namespace) -> "Iterator[_Comparison]":
    """With a yardstick for a model of this size."""
    from .tiny_model import TinyModel
    from .yardstick import Yardstick, neuron_files

    device, tiny = planner.device, None
    with ExitStack() as opened:
        if device.goes_by_steps(store.num_bytes):
            scratch = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="inflash-bench-plan-")))
            tiny = opened.enter_context(TinyModel(scratch / "tiny", tuple(device.state.cached_step_s)))
        yield _Comparison(store, options, planner, arguments, Yardstick(neuron_files(store), device.state.kernel_s, tiny))


class _Comparison:
    """Predicted and measured steps of plans."""

    def __init__(self, store: Store, options: Any, planner: Any, arguments: argparse.Namespace, yardstick: Any) -> None:
        self._store, self._options, self._planner, self._arguments = store, options, planner, arguments
        self._yardstick = yardstick

    def of_budget(self, batch: int, share: int) -> dict[str, Any]:
        """One budget's plan, predicted and measured, and with --grid its neighbours."""
        store, planner, arguments = self._store, self._planner, self._arguments
        length = min(arguments.length[arguments.batch.index(batch) % len(arguments.length)], store.config.max_positions)
        memory = store.num_bytes * share // 100
        if arguments.above_least:
            memory += planner.least_bytes(batch, length)
        row: dict[str, Any] = {"batch": batch, "budget": share, "memory_bytes": memory, "length": length}
        try:
            planned = planner.plan(memory, batch, length, positions=(arguments.prompt_tokens + length) // 2)
        except InflashError as error:
            return row | {"refused": str(error), "least_bytes": planner.least_bytes(batch, length)}
        row |= {
            "least_bytes": planned.least_bytes,
            "used_bytes": planned.used_bytes,
            "planned": planned.predicted.to_json(),
            "plan": planned.plan.to_json(),
        }
        row |= self._run(planned.plan, planned, self._options)
        if "measured" in row:
            row["error"] = row["predicted"]["total_ms"] / row["measured"]["total_ms"] - 1
        if arguments.grid and "measured" in row:
            row["grid"] = self._beside(planned)
        return row

    def _beside(self, planned: Any) -> list[dict[str, Any]]:
        """The neighbours' runs, each in turn with the plan's own."""
        from .plan_run import run_in_turns, standing

        memory, found = planned.memory_bytes, []
        limits = {"seconds": self._arguments.seconds, "most_steps": self._arguments.tokens}
        with standing(self._row_config(planned.plan, self._options), memory) as own:
            try:
                own.answer("ready")
                for name, changes, plan in neighbours(self._planner, planned):
                    with standing(self._row_config(plan, replace(self._options, **changes)), memory) as other:
                        found.append({"name": name, **run_in_turns(own, other, **limits), **other.memory()})
                own.end_input()
                own.answer("result")
            except InflashError as error:
                found.append({"name": "the plan itself, beside others", "failed": str(error), **own.memory()})
        return found

    def _predict(self, plan: Any, planned: Any, options: Any, state: Any) -> dict[str, float]:
        from ..pipeline.cost import CostModel

        cost = CostModel(self._store, options, self._planner.device.in_state(state, self._store.num_bytes), self._planner.curves)
        return cost.predict(plan, plan.num_seqs, planned.positions).to_json()

    def _run(self, plan: Any, planned: Any, options: Any) -> dict[str, Any]:
        from .plan_run import run_watched

        return run_watched(
            self._row_config(plan, options),
            planned.memory_bytes,
            seconds=self._arguments.seconds,
            most_steps=self._arguments.tokens,
            look=partial(self._yardstick.measure, *self._telling(plan)),
            predict=partial(self._predict, plan, planned, options),
        )

    def _telling(self, plan: Any) -> list[str]:
        """What is looked at between turns: only what says something of this plan."""
        from ..pipeline.machine_state import MachineState

        by_steps = self._planner.device.goes_by_steps(self._store.num_bytes)
        idle = {"kernel_s"} if by_steps else {"cached_step_s"}
        if not by_steps or not (any(plan.streamed_qkv) or any(plan.streamed_out) or plan.streamed_head):
            idle.add("streamed_step_s")
        return [field.name for field in fields(MachineState) if field.name not in idle]

    def _row_config(self, plan: Any, options: Any) -> dict[str, Any]:
        from .plan_text import tokens_for

        store, arguments = self._store, self._arguments
        token_ids, _ = tokens_for(store, arguments.text, plan.num_seqs, min(arguments.context, store.config.max_positions))
        return {
            "model": str(store.path),
            "options": asdict(replace(options, memory=None)),
            "plan": plan.to_json(),
            "token_ids": token_ids[:, ::-1].tolist(),  # not what the plan was calibrated on
            "prompt_tokens": arguments.prompt_tokens,
            "warm_up_s": arguments.seconds * _WARM_UP,
            "most_warm_up": max(16, arguments.warm_up // plan.num_seqs),
            "turn_s": arguments.seconds / _TURNS,
        }


def neighbours(planner: Any, planned: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Other plans for the same budget: name, changed options, plan."""
    plan, store = planned.plan, planner.store
    for name, changes in (
        ("two loaders", {"loaders": 2}),
        ("a quarter of the depth", {"queue_depth": max(1, plan.queue_depth // 4)}),
        ("no gaps read across", {"merge_gap": 0}),
        ("twice the gap", {"merge_gap": max(2 * plan.merge_gap, store.bundles.bundle_bytes)}),
    ):
        if replace(plan, **changes) != plan and planner.fits(replace(plan, **changes), planned.memory_bytes):
            yield name, {}, replace(plan, **changes)
    if plan.predictor is not None:
        yield "window of 4 tokens", {"policy": "window", "window": 4}, plan
    for name, other in planner.alternatives(planned):
        yield name, {}, other


def _report(store: Store, results: list[dict[str, Any]], plot: Path | None) -> None:
    rows, notes = [], []
    for row in results:
        if "measured" in row:
            rows.append(_cells(store, row))
        else:
            notes.append(f"batch {row['batch']}, {row['budget']}%: {row.get('refused') or row['failed']}")
    print("Predicted / measured, ms a step; peak: MiB beyond the budget.\n")
    print(table(_HEADER, rows))
    for note in notes:
        print(note)
    for row in results:
        for other in row.get("grid", []):
            if "measured" in other:
                took = f"{other['measured']['total_ms']:.1f} ms beside {other['beside_ms']:.1f} of the plan itself"
                longer = f"{other['longer']:+.0%}, give or take {other['longer_error']:.0%}"
                print(f"batch {row['batch']}, {row['budget']}%, {other['name']}: {took}, {longer}")
            else:
                print(f"batch {row['batch']}, {row['budget']}%, {other['name']}: {other['failed']}")
    errors = [abs(row["error"]) for row in results if "error" in row]
    summary = {"median_error": statistics.median(errors), "worst_error": max(errors)} if errors else {}
    if errors:
        print(f"\nerror: median {summary['median_error']:.0%}, worst {summary['worst_error']:.0%}")
    if plot and rows:
        from .plan_plot import save_comparison

        save_comparison(results, store, plot)
        print(f"plot: {plot}")
    print(json.dumps({"model": str(store.path), "model_bytes": store.num_bytes, "rows": results, **summary}))


def _cells(store: Store, row: dict[str, Any]) -> list[Any]:
    """A measured row under `_HEADER`."""
    from ..pipeline.plan import Plan

    plan, peak = row["plan"], row["peak_bytes"]
    return [
        row["batch"],
        f"{row['budget']}%",
        f"{row['memory_bytes'] / 2**20:.0f}",
        f"{Plan.from_json(plan).resident_attention:.0%}",
        f"{100 * sum(plan['slots']) / len(plan['ffn']) / store.config.d_ff:.0f}%",
        *(f"{row['predicted'][part]:.1f} / {row['measured'][part]:.1f}" for part in PARTS),
        f"{100 * row['error']:+.0f}%",
        f"{(peak - row['memory_bytes']) / 2**20:+.0f}" if peak else "-",
    ]
