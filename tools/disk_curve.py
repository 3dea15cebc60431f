"""What a disk gives to random reads, between the sizes and depths at which it was measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class DiskCurve:
    """Rates by size of a read and reads under way.

    Attributes:
      depths: that were measured, ascending; empty where nothing was.
    """

    def __init__(self, points: Sequence[dict[str, Any]]) -> None:
        """Takes the points of "read_curve": "size" in bytes, "depth", "bytes_per_s"."""
        self.depths = sorted({point["depth"] for point in points})
        self._lines = {
            depth: sorted((point["size"], point["bytes_per_s"]) for point in points if point["depth"] == depth)
            for depth in self.depths
        }

    def rate(self, size: float, depth: float) -> float:
        """Bytes a second, interpolated in the logarithms; outside of what was measured, the nearest."""
        at_depths = [np.interp(np.log(size), *np.log(np.array(self._lines[known]).T)) for known in self.depths]
        return float(np.exp(np.interp(np.log(depth), np.log(self.depths), at_depths)))

    def best_depth(self, size: float) -> int:
        """The least measured depth that gives nine tenths of the most for reads of this size."""
        rates = {depth: self.rate(size, depth) for depth in self.depths}
        return min(depth for depth, rate in rates.items() if rate >= 0.9 * max(rates.values()))
