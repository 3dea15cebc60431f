"""How a row of a bench, in a process of its own, tells the command what it does and finds; `row_process` is the other side."""

import json
from collections.abc import Callable
from typing import Any

from ..errors import InflashError
from ..pipeline.interpreter import end_with_parent


def tell_step(done: int) -> None:
    """Prints `{"step": ...}`, a sign of life."""
    print(json.dumps({"step": done}), flush=True)


def tell_result(measure: Callable[[], dict[str, Any]]) -> int:
    """Prints `{"result": ...}`, or `{"error": ...}` in one sentence; returns the exit code. A row whose bench is gone ends."""
    end_with_parent()
    try:
        document = {"result": measure()}
    except InflashError as error:
        document = {"error": str(error)}
    except Exception as error:  # the command says it in one sentence
        document = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(document), flush=True)
    return 1 if "error" in document else 0
