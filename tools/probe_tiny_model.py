"""A tiny model run for real: what `inflash probe` says of models that stay in the processor's caches, and of matrices that are streamed.

Kernels that were timed one by one, each waited for, take longer than in a run, where the next is begun meanwhile; with matrices of a few
hundred KiB that is much of their time. And a loader that reads a matrix takes a processor from kernels so short.
"""

import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np

from ..storage.store import Store

WIDTH, LAYERS = 256, 4
"""Of the model: that of the smallest kernels that are timed."""
_LENGTH, _POSITION = 128, 64
_TURNS, _TURN_STEPS = 15, 20


def fitted_tiny(device: Any, store: Store, yardstick: Any, batches: tuple[int, ...]) -> Any:
    """The `Device` with `cached_share` and `item_s` as this model's steps tell them.

    Args:
      device: with all else measured; of a machine whose caches keep the model, else nothing is concluded.
      store: of `small_model`, of this width.
      yardstick: the machine's pace.
      batches: sequences decoded together.
    """
    if not device.keeps(store.num_bytes):
        return device
    whole = _step_s(store, yardstick, device, batches, streamed=False)
    expected = {batch: _expected_s(device, store, batch, streamed=False) for batch in batches}
    device = replace(device, cached_share={batch: min(1.0, whole[batch] / expected[batch]) for batch in batches})
    passing = _step_s(store, yardstick, device, batches, streamed=True)
    beyond = {batch: passing[batch] - _expected_s(device, store, batch, streamed=True) for batch in batches}
    return replace(device, item_s={batch: max(0.0, beyond[batch]) / LAYERS for batch in batches})


def _plan(store: Store, batch: int, *, streamed: bool) -> Any:
    from ..pipeline.options import EngineOptions
    from ..pipeline.plan import plan_from_options

    plan = plan_from_options(store, EngineOptions(ffn="resident", max_num_seqs=batch, max_model_len=_LENGTH))
    return replace(plan, streamed_attention=(streamed,) * LAYERS)


def _step_s(store: Store, yardstick: Any, device: Any, batches: tuple[int, ...], *, streamed: bool) -> dict[int, float]:
    """Seconds of a step at the pace of the device's own figures, by number of sequences: all in memory, or attention streamed."""
    from ..pipeline.engine import Engine
    from ..pipeline.options import EngineOptions

    found = {}
    with Engine(store, EngineOptions(), plan=_plan(store, max(batches), streamed=streamed)) as engine:
        for batch in batches:
            engine.prepare(batch, _LENGTH)
            tokens, positions = np.full(batch, 7, np.int32), np.full(batch, _POSITION, np.int32)
            engine.process_prompts([(row, np.arange(_POSITION, dtype=np.int32)) for row in range(batch)])
            seconds = []
            for _ in range(_TURNS):
                pace = yardstick.cached_kernels()[batch] / device.state.cached_kernel_s[batch]
                began = time.perf_counter()
                for _ in range(_TURN_STEPS):
                    engine.decode(tokens, positions, np.ones(batch, bool))
                seconds.append((time.perf_counter() - began) / _TURN_STEPS / pace)
            found[batch] = statistics.median(seconds)
    return found


def _expected_s(device: Any, store: Store, batch: int, *, streamed: bool) -> float:
    """What the cost model says without `item_s`, at the device's own pace."""
    from ..pipeline.cost import CostModel
    from ..pipeline.hit_curves import assumed_curves
    from ..pipeline.options import EngineOptions

    model = CostModel(store, EngineOptions(), device, assumed_curves(store))
    return model.predict(_plan(store, batch, streamed=streamed), batch, _POSITION).total_ms / 1e3
