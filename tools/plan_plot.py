"""The picture of `inflash plan --plot`: what a step takes, by part, over budgets."""

from pathlib import Path
from typing import Any

from ..storage.store import Store
from .plot_file import new_figure, save_figure

PARTS = {
    "compute_ms": ("compute", "#4477aa"),
    "memory_ms": ("memory management", "#ccbb44"),
    "io_wait_ms": ("I/O wait", "#ee6677"),
}


def save_plot(curve: list[dict[str, Any]], planned: Any, store: Store, file: Path) -> None:
    """Draws predictions over budgets, in GiB, and marks the plan's own."""
    figure, axes = new_figure(1, (7.5, 4.5))
    budgets = [point["memory_bytes"] / 2**30 for point in curve]
    axes.stackplot(
        budgets,
        *([point[name] for point in curve] for name in PARTS),
        labels=[label for label, _ in PARTS.values()],
        colors=[colour for _, colour in PARTS.values()],
    )
    axes.axvline(planned.memory_bytes / 2**30, color="black", linestyle=":", label="this budget")
    axes.axvline(store.num_bytes / 2**30, color="grey", linestyle="--", label="the model's size")
    axes.set_xlabel("memory for everything, GiB")
    axes.set_ylabel(f"ms a step of {planned.num_seqs}" if planned.num_seqs > 1 else "ms a token")
    axes.set_xlim(budgets[0], max(budgets[-1], planned.memory_bytes / 2**30))
    axes.legend()
    axes.set_title(f"{store.path.name}, {planned.num_seqs} x {planned.max_length} tokens")
    save_figure(figure, file)
