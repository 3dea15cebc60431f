"""How long a call takes."""

import time
from collections.abc import Callable


def seconds_of(call: Callable[[], object], times: int = 1) -> float:
    """Seconds of so many calls, one after the other; a call waits for what it computes."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - began
