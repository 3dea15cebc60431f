"""`inflash plan`: how a memory budget would be spent, and what to expect of it, at this budget and at others."""

import argparse
import json
import sys
from collections import Counter
from typing import Any

from ..errors import InflashError
from ..storage.store import Store, open_store
from . import arguments as flags
from .table import table

DEFAULT_LENGTH = 512
_CURVE_POINTS = 14
PARTS = ("io_wait_ms", "memory_ms", "compute_ms", "total_ms")


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.planned_engine import budget, open_planner

    if arguments.plot:
        from .plot_file import check_plot

        check_plot(arguments.plot)
    store, options = open_store(arguments.model), flags.engine_options(arguments)
    if options.memory is None:
        raise InflashError("plan: expected --memory BYTES, such as 6GiB, or auto; found none")
    length = arguments.length or min(DEFAULT_LENGTH, store.config.max_positions)
    if length > store.config.max_positions:
        raise InflashError(f"--length: {store.path} has {store.config.max_positions} positions, found {length}")
    if arguments.calibrate:
        calibrate_store(store, options, arguments.text)
    planner, notes = open_planner(store, options, arguments.device)
    planned = planner.plan(budget(options), arguments.batch, length)
    curve = budget_curve(planner, planned)
    if arguments.plot:
        from .plan_plot import save_plot

        save_plot(curve, planned, store, arguments.plot)
    document = plan_document(store, planned, notes) | {"curve": curve}
    if arguments.json:
        print(json.dumps(document))
        return 0
    print(describe(store, options, planned))
    print("\nOther budgets:\n")
    print(curve_table(curve))
    for note in notes:
        print(f"\nNote: {note}.")
    if arguments.plot:
        print(f"\nplot: {arguments.plot}")
    return 0


def calibrate_store(store: Store, options: Any, text: Any) -> None:
    """Counts what the model names over a text, and keeps it."""
    from ..pipeline.calibration import CONTEXT, TOKENS, calibrate, calibration_steps
    from ..pipeline.hit_curves import save_curves
    from .plan_text import tokens_for
    from .progress import progress_bar

    context = min(CONTEXT, store.config.max_positions)
    token_ids, source = tokens_for(store, text, max(1, TOKENS // context), context)
    with progress_bar(total=calibration_steps(store), desc="calibrating", unit=" steps") as bar:
        curves = calibrate(store, options, token_ids, source, bar.update)
    print(f"calibrated on {token_ids.size} tokens of {source}: {save_curves(store, curves)}", file=sys.stderr)


def budget_curve(planner: Any, planned: Any) -> list[dict[str, Any]]:
    """Predictions at budgets from the least to all that helps: a dictionary for each."""
    least = planned.least_bytes
    most = planner.most_bytes(planned.num_seqs, planned.max_length)
    points = []
    for number in range(_CURVE_POINTS):
        memory = least + (most - least) * number // (_CURVE_POINTS - 1)
        there = planner.plan(memory, planned.num_seqs, planned.max_length, planned.positions)
        points.append({"memory_bytes": memory, **there.predicted.to_json(), **_shares(there.plan, planner.store)})
    return points


def _shares(plan: Any, store: Store) -> dict[str, Any]:
    config = store.config
    return {
        "resident_attention": plan.resident_attention,
        "neurons_in_memory": sum(plan.slots) / (config.num_layers * config.d_ff),
    }


def plan_document(store: Store, planned: Any, notes: list[str]) -> dict[str, Any]:
    """What `--json` prints; docs/cli.md lists the keys."""
    return {
        "model": str(store.path),
        "model_bytes": store.num_bytes,
        "memory_bytes": planned.memory_bytes,
        "least_bytes": planned.least_bytes,
        "used_bytes": planned.used_bytes,
        "batch": planned.num_seqs,
        "length": planned.max_length,
        "predicted": planned.predicted.to_json(),
        "read_bytes": planned.predicted.read_bytes,
        "plan": planned.plan.to_json(),
        "notes": notes,
    }


def describe(store: Store, options: Any, planned: Any) -> str:
    """The plan in words and tables."""
    from ..pipeline.host_memory import program_bytes
    from ..pipeline.memory_parts import memory_parts

    plan, config = planned.plan, store.config
    parts = memory_parts(store, options, plan) | {"program": program_bytes(plan.loaders, from_nothing=True)}
    lines = [
        f"{store.path}: {store.num_bytes / 2**20:.0f} MiB of weights, {planned.memory_bytes / 2**20:.0f} MiB of memory "
        f"({100 * planned.memory_bytes / store.num_bytes:.0f}%), {planned.num_seqs} x {planned.max_length} tokens",
        "",
        table(
            ["in memory", "MiB", ""], [[name, f"{size / 2**20:.0f}", _what(name, plan, config)] for name, size in parts.items()]
        ),
        f"together {planned.used_bytes / 2**20:.0f} MiB; the least that would do is {-(-planned.least_bytes // 2**20)} MiB",
        "",
        f"{plan.loaders} loader with {plan.queue_depth} reads under way, gaps up to {plan.merge_gap} bytes read across, "
        + (f"neurons guessed a layer before by {plan.prefetch}" if plan.prefetch else "nothing read before its layer"),
        "",
        table(
            ["expected", "I/O wait ms", "memory ms", "compute ms", "total ms", "MiB read"],
            [
                [
                    "a step" if planned.num_seqs > 1 else "a token",
                    *(f"{getattr(planned.predicted, name):.1f}" for name in PARTS),
                    f"{planned.predicted.read_bytes / 2**20:.1f}",
                ]
            ],
        ),
    ]
    return "\n".join(lines)


def _what(name: str, plan: Any, config: Any) -> str:
    if name == "attention and embeddings":
        return f"{plan.resident_attention:.0%} of attention, head {'streamed' if plan.streamed_head else 'in memory'}"
    if name == "neurons":
        ways = Counter(plan.ffn)
        slots = [count for count in plan.slots if count]
        sizes = (
            f"; {min(slots)} to {max(slots)} of {config.d_ff} a layer, {sum(slots) / len(slots):.0f} on average" if slots else ""
        )
        return ", ".join(f"{count} layers {way}" for way, count in sorted(ways.items())) + sizes
    if name == "predictor":
        return ", ".join(filter(None, (plan.predictor, plan.prefetch)))
    if name == "KV cache":
        return f"{plan.num_seqs} x {plan.max_length} tokens"
    return ""


def curve_table(points: list[dict[str, Any]]) -> str:
    """Budgets and what they bring."""
    rows = [
        [
            f"{point['memory_bytes'] / 2**20:.0f}",
            f"{point['resident_attention']:.0%}",
            f"{point['neurons_in_memory']:.0%}",
            *(f"{point[name]:.1f}" for name in PARTS),
        ]
        for point in points
    ]
    return table(["MiB", "attention", "neurons", "I/O wait ms", "memory ms", "compute ms", "total ms"], rows)
