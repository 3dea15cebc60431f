"""The picture of `inflash bench ablation`: where a token's time goes, row by row."""

from pathlib import Path
from typing import Any

from ..storage.store import Store
from .plot_file import new_figure, save_figure

_PARTS = (("io_wait_ms", "I/O wait", "C3"), ("memory_ms", "memory management", "C1"), ("compute_ms", "compute", "C0"))


def save_plot(rows: list[dict[str, Any]], store: Store, memory_limit: int, file: Path) -> None:
    """Draws the rows into an image file: all of them on a logarithmic scale, and their parts on a linear one.

    Raises:
      RunError: the file cannot be written.
    """
    figure, (whole, parts) = new_figure(2, (13, 0.5 * len(rows) + 2))
    names = [row["name"] for row in rows]
    bars = whole.barh(names, [row["total_ms"] for row in rows], color="C0")
    whole.bar_label(bars, labels=[f"{row['total_ms']:,.0f} ms" for row in rows], padding=4)
    whole.set(xscale="log", xlabel="ms a token (logarithmic)", title="Time a token")
    sparse = [row for row in rows if row["name"] not in ("naive", "hybrid")] or rows
    left = [0.0] * len(sparse)
    for key, label, colour in _PARTS:
        values = [row[key] for row in sparse]
        parts.barh([row["name"] for row in sparse], values, left=left, label=label, color=colour)
        left = [before + value for before, value in zip(left, values, strict=True)]
    parts.set(xlabel="ms a token", title="Its parts, without the rows that stream")
    parts.legend()
    for axis in (whole, parts):
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.18)
    figure.suptitle(f"{store.path.name}: {store.num_bytes / 2**30:.1f} GiB of weights, {memory_limit / 2**30:.1f} GiB of memory")
    save_figure(figure, file)
