"""Images of `--plot`, drawn with matplotlib, which is optional and slow to import."""

from pathlib import Path
from typing import Any

from ..errors import InflashError, RunError


def check_plot(file: Path) -> None:
    """Finds what would keep an image from being written, before the work whose result it shows.

    Raises:
      InflashError: matplotlib is missing, there is no such folder, or no such kind of image.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise InflashError("--plot needs matplotlib, which is not installed; run pip install 'inflash[plot]'") from error
    if not file.absolute().parent.is_dir():
        raise InflashError(f"--plot: {file.absolute().parent}: this folder does not exist; make it first")
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in kinds:
        raise InflashError(f"--plot: {file}: expected a name that ends in one of {', '.join(kinds)}")


def new_figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure with so many axes side by side, `size` in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=size, layout="constrained")


def save_figure(figure: Any, file: Path) -> None:
    """Writes the image, in the format that the file's ending names, and forgets the figure.

    Raises:
      RunError: the file cannot be written.
    """
    from matplotlib import pyplot

    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: the plot cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
