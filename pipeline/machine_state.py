"""How fast a machine is at one time, in a few figures that what was measured at another time can be scaled by."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """How fast a machine was at one time, by five pieces of work that never change. Shared machines vary by a factor of two.

    Attributes:
      kernel_s: of one product with a matrix that no cache holds, by number of sequences.
      cached_kernel_s: of some products with a matrix that stays in the processor's caches, by number of sequences.
      processor_s: of the bookkeeping of a neuron cache, in one thread.
      random_bytes_per_s, stream_bytes_per_s: of the disk.
    """

    kernel_s: Mapping[int, float]
    cached_kernel_s: Mapping[int, float]
    processor_s: float
    random_bytes_per_s: float
    stream_bytes_per_s: float

    @classmethod
    def between(cls, states: Sequence["MachineState"]) -> "MachineState":
        """The medians of several."""
        return cls(
            kernel_s=_medians([state.kernel_s for state in states]),
            cached_kernel_s=_medians([state.cached_kernel_s for state in states]),
            processor_s=statistics.median(state.processor_s for state in states),
            random_bytes_per_s=statistics.median(state.random_bytes_per_s for state in states),
            stream_bytes_per_s=statistics.median(state.stream_bytes_per_s for state in states),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "MachineState":
        products = {
            name: {int(batch): each for batch, each in document[name].items()} for name in ("kernel_s", "cached_kernel_s")
        }
        return cls(**{**document, **products})


def _medians(values: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {batch: statistics.median(each[batch] for each in values) for batch in values[0]}
