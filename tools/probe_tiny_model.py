"""What `inflash probe` concludes from a tiny model's steps: what models take that caches keep, and what streamed matrices do.

A loader that reads a matrix takes a processor from kernels as short as this model's.
"""

import statistics
from dataclasses import replace
from typing import Any

from .tiny_model import NUM_LAYERS, POSITION, TinyModel

_TURNS = 8


def fitted_to_steps(tiny: TinyModel, device: Any) -> Any:
    """The `Device` with `cached_share`, `item_s` and the state's steps as the model's tell them.

    Args:
      device: with all else measured; of a machine whose caches keep the model, else nothing is concluded.
    """
    if not device.keeps(tiny.store.num_bytes):
        return device
    whole, streamed = {}, {}
    for batch in tiny.batches:
        whole[batch], streamed[batch] = steps_in_turn(tiny, batch)
    share = {batch: whole[batch] / expected_s(tiny, device, batch, streamed=False) for batch in tiny.batches}
    state = replace(device.state, cached_step_s=whole, streamed_step_s=streamed)
    device = replace(device, state=state, cached_share=share)
    beyond = {batch: streamed[batch] - expected_s(tiny, device, batch, streamed=True) for batch in tiny.batches}
    return replace(device, item_s={batch: max(0.0, beyond[batch]) / NUM_LAYERS for batch in tiny.batches})


def steps_in_turn(tiny: TinyModel, batch: int) -> tuple[float, float]:
    """Seconds of a step with everything in memory, and of one that streams.

    They run in turns, and what streams is told by how many times as long as the other it took just then: a shared machine is a fifth off
    for a turn or for a minute.
    """
    wholes, times = [], []
    for _ in range(_TURNS):
        wholes.append(tiny.step_s(batch))
        times.append(tiny.step_s(batch, streamed=True) / wholes[-1])
    whole = statistics.median(wholes)
    return whole, whole * statistics.median(times)


def expected_s(tiny: TinyModel, device: Any, batch: int, *, streamed: bool) -> float:
    """What the cost model says of a step, at the device's own pace."""
    from ..pipeline.cost import CostModel
    from ..pipeline.hit_curves import assumed_curves
    from ..pipeline.options import EngineOptions

    model = CostModel(tiny.store, EngineOptions(), device, assumed_curves(tiny.store))
    return model.predict(tiny.plan(batch, streamed=streamed), batch, POSITION).total_ms / 1e3
