"""What the kernels of resident weights take, at several widths: a part of `inflash probe`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..pipeline import native_library
from ..pipeline.device import KernelTimes, Rate
from .kernel_cases import FEW_POSITIONS, Weights, compile_all, kernel_cases, timed_rounds

Pace = Mapping[int, float]
"""Seconds of a piece of work that never changes, by number of sequences."""

_NAMES = {
    "attention": "short attention",
    "head": "head",
    "predictor": "predictor",
    "two predictors": "predictor and look-ahead",
    "gather": "gathered_ffn",
    "dense": "dense_ffn",
}
"""Of `kernel_cases`, by those of a `Device`."""
_UNEVEN = ("gathered_ffn", "dense_ffn")
"""Whose time is not a line in their bytes, so that a third width says more than two do."""


class ProbedKernels:
    """The kernels of models of several widths, compiled in the form that runs use."""

    def __init__(self, widths: Mapping[int, Sequence[int]]) -> None:
        """Compiles.

        Args:
          widths: by number of sequences: d_model, ascending from the same one; d_ff is four times as much, the head has as many rows.
        """
        is_native = native_library.choose()
        self._widths, self._cases = widths, []
        for width in sorted({width for each in widths.values() for width in each}):
            weights = Weights(width, 4 * width, 4 * width)
            for batch in (batch for batch, each in widths.items() if width in each):
                cases = [case for case in kernel_cases(weights, batch) if width in self._measured(case.name, batch)]
                self._cases += [(width, case, case.prepare(case)) for case in (replace(each, native=is_native) for each in cases)]
        compile_all([call for _, _, call in self._cases])

    def measure(self, seconds: float, pace: Callable[[], Pace]) -> tuple[dict[str, dict[int, KernelTimes]], Pace]:
        """Times by a `Device`'s names and number of sequences, and the pace that they are told for.

        Those of the least width are measured among themselves, as they come: a model so small stays in the processor's caches, too, and
        the tiny model's steps say what they take in a run.

        Args:
          seconds: length of each measurement.
          pace: once a round beside kernels whose weights no cache holds.
        """
        least = min(width for width, _, _ in self._cases)
        small, _ = self._timed(lambda width: width == least, seconds, lambda: dict.fromkeys(self._widths, 1.0))
        large, median = self._timed(lambda width: width > least, seconds, pace)
        measured = small | large
        looking = {batch: self._looking_back(measured, batch) for batch in self._widths}
        found: dict[str, dict[int, KernelTimes]] = {name: {} for name in _NAMES}
        for name, kernel in _NAMES.items():
            for batch in self._widths:
                widths = self._measured(kernel, batch)
                points = [measured[kernel, width, batch] for width in widths]
                if name == "attention":
                    points = [
                        _without(looking[batch], FEW_POSITIONS * batch * 8 * width, *point)
                        for width, point in zip(widths, points, strict=True)
                    ]
                found[name][batch] = KernelTimes.of(points)
        keys_and_values = {batch: KernelTimes.along(rate) for batch, rate in looking.items()}
        return found | {"keys and values": keys_and_values}, median

    def _measured(self, kernel: str, batch: int) -> Sequence[int]:
        """The widths at which a kernel of `kernel_cases` is timed."""
        widths = self._widths[batch]
        if kernel == "attention":  # over many positions, only for how much longer than over few
            return widths[1:2]
        if kernel in _UNEVEN:
            return widths
        return widths[:2] if kernel in _NAMES.values() else ()

    def _timed(
        self, of_width: Callable[[int], bool], seconds: float, pace: Callable[[], Pace]
    ) -> tuple[dict[tuple[str, int, int], tuple[int, float]], Pace]:
        """Bytes of weights, and the seconds of a call at the median pace, by kernel, width and batch; and that pace."""
        timed = [each for each in self._cases if of_width(each[0])]
        paces: list[Pace] = []
        rounds = timed_rounds([call for _, _, call in timed], seconds, lambda: paces.append(pace()))
        median = {batch: float(np.median([each[batch] for each in paces])) for batch in self._widths}
        found = {}
        for (width, case, _), times in zip(timed, zip(*rounds, strict=True), strict=True):
            paced = [time * median[case.batch] / each[case.batch] for time, each in zip(times, paces, strict=True)]
            found[case.name, width, case.batch] = case.num_bytes, float(np.median(paced))
        return found, median

    def _looking_back(self, measured: Mapping[tuple[str, int, int], tuple[float, float]], batch: int) -> Rate:
        """The rate at which attention takes in keys and values: by how much longer it takes over many positions than over few."""
        (width,) = self._measured("attention", batch)
        (most, longer), (least, shorter) = (measured[kernel, width, batch] for kernel in ("attention", "short attention"))
        return Rate(fixed_s=0.0, bytes_per_s=(most - least) / max(longer - shorter, 1e-9))


def _without(rate: Rate, looked_at: float, num_bytes: float, seconds: float) -> tuple[float, float]:
    """A kernel's point less what it looked back on."""
    return num_bytes - looked_at, max(seconds - rate.seconds(looked_at), seconds / 2)
