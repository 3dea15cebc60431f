"""The pictures of `inflash plan --plot` and `inflash bench plan --plot`: what a step takes, over budgets."""

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


def save_comparison(rows: list[dict[str, Any]], store: Store, file: Path) -> None:
    """Draws predicted and measured steps over budgets, one panel for each number of sequences."""
    batches = sorted({row["batch"] for row in rows})
    figure, panels = new_figure(len(batches), (5.5 * len(batches), 4.2))
    for axes, batch in zip(panels if len(batches) > 1 else [panels], batches, strict=True):
        ran = [row for row in rows if row["batch"] == batch and "measured" in row]
        budgets = [row["memory_bytes"] / 2**30 for row in ran]
        axes.plot(budgets, [row["predicted"]["total_ms"] for row in ran], "o--", color="#4477aa", label="predicted")
        axes.plot(budgets, [row["measured"]["total_ms"] for row in ran], "s-", color="#ee6677", label="measured")
        axes.set_yscale("log")
        axes.set_xlabel("memory for everything, GiB")
        axes.set_ylabel("ms a token" if batch == 1 else f"ms a step of {batch} sequences")
        axes.legend()
    figure.suptitle(f"{store.path.name}, {store.num_bytes / 2**30:.2f} GiB of weights")
    save_figure(figure, file)
