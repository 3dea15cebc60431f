"""`inflash bench plan`: plans for several budgets, run under a memory cgroup of that size, beside what they were predicted to take.

Every run is a process of its own that only follows the plan. Its cgroup may hold the budget and 64 MiB, page cache and shared memory
counted; a run that needs more is ended by the kernel and reported. The plan goes by what was probed; what it is predicted to take, by how
fast the disk is just before the run.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import InflashError
from ..storage.layout import bundles_path
from ..storage.read_rate import read_rate
from ..storage.shard_index import open_raw_array
from ..storage.store import Store, open_store
from . import arguments as flags
from .memory_group import NoCgroup, memory_group
from .progress import progress_bar
from .table import table

ALLOWANCE_BYTES = 64 << 20
_KILLED = (-9, 137)
_DISK_S, _STREAM_DEPTH, _SMALLEST_READ = 0.8, 16, 4096
_PARTS = ("io_wait_ms", "memory_ms", "compute_ms", "total_ms")


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
    with progress_bar(total=len(runs), desc="measuring", unit=" runs") as bar:
        for batch, share in runs:
            results.append(_run(store, options, planner, batch, share, arguments))
            bar.update()
    _report(store, results, arguments.plot)
    return 0


def _run(store: Store, options: Any, planner: Any, batch: int, share: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One budget's plan, predicted and measured, and with --grid its neighbours."""
    from ..pipeline.cost import CostModel

    length = min(arguments.length[arguments.batch.index(batch) % len(arguments.length)], store.config.max_positions)
    memory = store.num_bytes * share // 100
    if arguments.above_least:
        memory += planner.least_bytes(batch, length)
    row: dict[str, Any] = {"batch": batch, "budget": share, "memory_bytes": memory, "length": length}
    try:
        planned = planner.plan(memory, batch, length, positions=(arguments.prompt_tokens + length) // 2)
    except InflashError as error:
        return row | {"refused": str(error), "least_bytes": planner.least_bytes(batch, length)}
    disk = _disk_now(store, planner.device, planned.plan)
    now = CostModel(store, options, planner.device.with_disk(**disk), planner.curves)
    predicted = now.predict(planned.plan, batch, planned.positions)
    row |= {
        "disk": disk,
        "least_bytes": planned.least_bytes,
        "used_bytes": planned.used_bytes,
        "predicted": predicted.to_json(),
        "predicted_read_bytes": predicted.read_bytes,
        "plan": planned.plan.to_json(),
    }
    row |= _measured(store, options, planned.plan, memory, arguments)
    if "measured" in row:
        row["error"] = predicted.total_ms / row["measured"]["total_ms"] - 1
    if arguments.grid:
        row["grid"] = [
            {"name": name, **_measured(store, replace(options, **changes), plan, memory, arguments)}
            for name, changes, plan in neighbours(planner, planned)
        ]
    return row


def _disk_now(store: Store, device: Any, plan: Any) -> dict[str, float]:
    """How fast the disk is now, beside what was probed: shared disks differ by more within minutes than plans do."""
    file, num_bytes = open_raw_array(store.path / bundles_path(0)).file, store.bundles.layer_bytes
    size, depth, block = max(store.bundles.bundle_bytes, _SMALLEST_READ), plan.queue_depth, min(1 << 20, num_bytes)
    random = read_rate(file, num_bytes, size, depth, _DISK_S)
    in_order = read_rate(file, num_bytes, block, _STREAM_DEPTH, _DISK_S, in_order=True)
    return {"random": random / device.rate_at(size, depth), "stream": in_order / device.rate_at(block, _STREAM_DEPTH)}


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


def _measured(store: Store, options: Any, plan: Any, memory: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run of the plan in a cgroup: `measured` and `peak_bytes`, or `failed`."""
    from .plan_text import tokens_for

    token_ids, _ = tokens_for(store, arguments.text, plan.num_seqs, min(arguments.context, store.config.max_positions))
    config = {
        "model": str(store.path),
        "options": asdict(replace(options, memory=None)),
        "plan": plan.to_json(),
        "token_ids": token_ids[:, ::-1].tolist(),  # not what the plan was calibrated on
        "prompt_tokens": arguments.prompt_tokens,
        "warm_up_s": arguments.seconds * 2,
        "measured_s": arguments.seconds,
        "most_warm_up": max(16, arguments.warm_up // plan.num_seqs),
        "most_measured": arguments.tokens,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, contextlib.ExitStack() as stack:
        json.dump(config, file)
        file.flush()
        command = [sys.executable, "-P", "-m", "inflash.tools.plan_row", file.name]
        try:
            group = stack.enter_context(memory_group(memory + ALLOWANCE_BYTES))
            command = group.wrap(command)
        except NoCgroup:
            group = None
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        peak = group.peak_bytes() if group else None
    lines = ended.stdout.splitlines()
    document = (
        json.loads(lines[-1])
        if lines
        else {"error": "ended by the kernel for its memory" if ended.returncode in _KILLED else f"ended with {ended.returncode}"}
    )
    if "error" in document:
        return {"failed": document["error"], "peak_bytes": peak}
    return {"measured": document["result"], "peak_bytes": peak, "limited": group is not None}


def _report(store: Store, results: list[dict[str, Any]], plot: Path | None) -> None:
    rows, notes = [], []
    for row in results:
        name = [row["batch"], f"{row['budget']}%", f"{row['memory_bytes'] / 2**20:.0f}"]
        if "measured" not in row:
            notes.append(f"batch {row['batch']}, {row['budget']}%: {row.get('refused') or row['failed']}")
            continue
        plan, peak = row["plan"], row["peak_bytes"]
        rows.append(
            [
                *name,
                f"{sum(not streamed for streamed in plan['streamed_attention'])}/{len(plan['ffn'])}",
                f"{100 * sum(plan['slots']) / len(plan['ffn']) / store.config.d_ff:.0f}%",
                *(f"{row['predicted'][part]:.1f} / {row['measured'][part]:.1f}" for part in _PARTS),
                f"{100 * row['error']:+.0f}%",
                f"{(peak - row['memory_bytes']) / 2**20:+.0f}" if peak else "-",
            ]
        )
    header = [
        "batch",
        "budget",
        "MiB",
        "attention",
        "neurons",
        "I/O wait ms",
        "memory ms",
        "compute ms",
        "total ms",
        "error",
        "peak",
    ]
    print("Predicted / measured, ms a step; peak: MiB beyond the budget.\n")
    print(table(header, rows))
    for note in notes:
        print(note)
    for row in results:
        for other in row.get("grid", []):
            if "measured" in other:
                change = other["measured"]["total_ms"] / row["measured"]["total_ms"] - 1 if "measured" in row else 0.0
                print(
                    f"batch {row['batch']}, {row['budget']}%, {other['name']}: {other['measured']['total_ms']:.1f} ms, {100 * change:+.0f}%"
                )
    errors = [abs(row["error"]) for row in results if "error" in row]
    summary = {"median_error": statistics.median(errors), "worst_error": max(errors)} if errors else {}
    if errors:
        print(f"\nerror: median {summary['median_error']:.0%}, worst {summary['worst_error']:.0%}")
    if plot and rows:
        from .plan_plot import save_comparison

        save_comparison(results, store, plot)
        print(f"plot: {plot}")
    print(json.dumps({"model": str(store.path), "model_bytes": store.num_bytes, "rows": results, **summary}))
