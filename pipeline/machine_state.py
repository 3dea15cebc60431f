"""How fast a machine is at one time, in a few figures that what was measured at another time can be scaled by."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """How fast a machine was at one time, by pieces of work that never change. Shared machines vary by a factor of two.

    Attributes:
      kernel_s: of one product with a matrix that no cache holds, by number of sequences.
      cached_step_s: of a step of a model that stays in the processor's caches, by number of sequences; empty where none was run.
      streamed_step_s: of the same with attention's matrices streamed.
      processor_s: of the bookkeeping of a neuron cache, in one thread.
      random_bytes_per_s, stream_bytes_per_s: of the disk.
    """

    kernel_s: Mapping[int, float]
    cached_step_s: Mapping[int, float]
    streamed_step_s: Mapping[int, float]
    processor_s: float
    random_bytes_per_s: float
    stream_bytes_per_s: float

    @classmethod
    def between(cls, states: Sequence["MachineState"]) -> "MachineState":
        """The medians of several."""
        return cls(
            kernel_s=_medians([state.kernel_s for state in states]),
            cached_step_s=_medians([state.cached_step_s for state in states]),
            streamed_step_s=_medians([state.streamed_step_s for state in states]),
            processor_s=statistics.median(state.processor_s for state in states),
            random_bytes_per_s=statistics.median(state.random_bytes_per_s for state in states),
            stream_bytes_per_s=statistics.median(state.stream_bytes_per_s for state in states),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "MachineState":
        names = ("kernel_s", "cached_step_s", "streamed_step_s")
        by_batch = {name: {int(batch): each for batch, each in document[name].items()} for name in names}
        return cls(**{**document, **by_batch})


def _medians(values: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {batch: statistics.median(each[batch] for each in values) for batch in values[0]}
