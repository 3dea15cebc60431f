"""The picture of `inflash eval --plot`: shares by layer, and recall against neurons named."""

from pathlib import Path
from typing import Any

from .plot_file import new_figure, save_figure


def save_plot(document: dict[str, Any], file: Path) -> None:
    """Draws the document of `pipeline.evaluation.evaluate` into an image file; its ending chooses the format.

    Raises:
      RunError: the file cannot be written.
    """
    figure, axes = new_figure(3, (15, 4.5))
    by_layer, missed, trade = axes
    for number, (name, figures) in enumerate(document["predictors"].items()):
        colour, layers = f"C{number % 10}", figures["layers"]
        numbers = [layer["layer"] for layer in layers]
        if not number:
            by_layer.plot(numbers, [100 * layer["active"] for layer in layers], "k--", marker=".", label="truly active")
        by_layer.plot(numbers, [100 * layer["predicted"] for layer in layers], color=colour, marker="o", label=name)
        missed.plot(numbers, [100 * layer["false_negatives"] for layer in layers], color=colour, marker="o", label=name)
        trade.plot(
            [100 * point["predicted"] for point in figures["curve"]],
            [100 * point["recall"] for point in figures["curve"]],
            color=colour,
            label=name,
        )
        trade.plot(100 * figures["predicted"], 100 * figures["recall"], "o", color=colour)
    _label(by_layer, "Neurons named", "layer", "% of the neurons")
    _label(missed, "Active neurons missed (false negatives)", "layer", "% of the active neurons")
    _label(trade, "What recall costs, all layers (dot: as calibrated)", "% of the neurons named", "recall, %")
    for axis in (by_layer, missed):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(bottom=0)
    dense = document["dense"]["perplexity"]
    figure.suptitle(f"{Path(document['model']).name}: {document['tokens']} tokens, dense perplexity {dense:.2f}")
    save_figure(figure, file)


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
