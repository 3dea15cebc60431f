"""The picture of `inflash bench batch`: tokens a second over batches, a line for each path."""

from pathlib import Path
from typing import Any

from ..storage.store import Store
from .plot_file import new_figure, save_figure

_STYLES = {"sparse": ("o--", "#4477aa"), "dense": ("s--", "#ee6677"), "auto": ("D-", "black")}
_LABELS = {"sparse": "predicted neurons by slot", "dense": "all neurons in order", "auto": "chosen as measured"}


def save_plot(rows: list[dict[str, Any]], store: Store, file: Path) -> None:
    """Draws speeds, and what is read for a token, both on logarithmic scales.

    Raises:
      RunError: the file cannot be written.
    """
    figure, (speed, reads) = new_figure(2, (11, 4.2))
    for path in dict.fromkeys(row["path"] for row in rows):
        line, colour = _STYLES[path]
        found = [row for row in rows if row["path"] == path]
        batches = [row["batch"] for row in found]
        speed.plot(batches, [row["tokens_per_s"] for row in found], line, color=colour, label=_LABELS[path])
        reads.plot(batches, [row["read_mib_per_token"] for row in found], line, color=colour)
    for axes, label in ((speed, "tokens/s"), (reads, "MiB read a token")):
        axes.set(xscale="log", yscale="log", xlabel="requests decoded together", ylabel=label)
        axes.grid(alpha=0.3)
    speed.legend()
    figure.suptitle(f"{store.path.name}, {store.num_bytes / 2**30:.2f} GiB of weights")
    save_figure(figure, file)
