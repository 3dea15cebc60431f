"""Progress bars: moving on a terminal, a line every so often in a log."""

import sys
from typing import Any

from tqdm import tqdm

_LOG_INTERVAL_S = 10.0


class _Lines:
    """A stream on which each state of a bar is a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(**options: Any) -> tqdm:
    """A tqdm bar on standard error; `options` are tqdm's."""
    if sys.stderr.isatty():
        return tqdm(file=sys.stderr, **options)
    return tqdm(**{"file": _Lines(), "mininterval": _LOG_INTERVAL_S, "ascii": True, "ncols": 100, **options})


def bytes_bar(total: int | None, description: str) -> tqdm:
    return progress_bar(total=total, delay=0.2, unit="B", unit_scale=True, unit_divisor=1024, desc=description)
