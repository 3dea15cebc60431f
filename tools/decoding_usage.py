"""What a process used while tokens were decoded: of its totals, what they grew by between two moments."""

from collections.abc import Sequence
from typing import Any

import numpy as np

TOTALS = (
    "user_s", "system_s", "queue_wait_s", "major_faults", "minor_faults", "voluntary_switches", "involuntary_switches", "read_bytes",
)  # fmt: skip


def decoding_usage(samples: dict[str, list[Any]], begin_s: float, end_s: float) -> dict[str, float | None]:
    """By the names in `TOTALS`; None where a total was not looked at twice in that time.

    Args:
      samples: columns, as `ProcessSampler.document` gives them.
      begin_s, end_s: first token begun and last one done, on the samples' clock.
    """
    return {name: growth(samples["at_s"], samples[name], begin_s, end_s) for name in TOTALS}


def growth(at_s: Sequence[float], totals: Sequence[float | None], begin_s: float, end_s: float) -> float | None:
    """Growth of a total between two moments, at the pace of what was seen of it in that time.

    A total that is looked at rarely is not known at either end: its pace over what is known stands for all of the time.
    """
    known = [(at, total) for at, total in zip(at_s, totals, strict=True) if total is not None]
    if len(known) < 2:
        return None
    times, values = np.array(known, np.float64).T
    first, last = max(begin_s, times[0]), min(end_s, times[-1])
    if last <= first:
        return None
    seen = float(np.interp(last, times, values) - np.interp(first, times, values))
    return seen * (end_s - begin_s) / (last - first)
