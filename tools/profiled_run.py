"""The process that `inflash profile` watches, and ends with: attaches its recorder, then runs an ordinary command line."""

import contextlib
import json
import sys
from collections.abc import Iterator

from ..pipeline import trace
from ..pipeline.interpreter import end_with_parent
from .cli import main


def run(descriptor: int, jax_trace: str | None, words: list[str]) -> int:
    """The exit code of the command line `words`, its spans in the trace area behind `descriptor`."""
    end_with_parent()
    trace.attach(descriptor)
    with _jax_trace(jax_trace):
        return main(words)


@contextlib.contextmanager
def _jax_trace(folder: str | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    import jax

    with jax.profiler.trace(folder):
        yield


if __name__ == "__main__":
    sys.exit(run(**json.loads(sys.argv[1])))
