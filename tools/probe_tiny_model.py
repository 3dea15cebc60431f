"""A tiny model run for real: what `inflash probe` says of models that stay in the processor's caches, and of matrices that are streamed.

Kernels that were timed one by one, each waited for, take longer than in a run, where the next is begun meanwhile; with matrices of a few
hundred KiB that is much of their time. And a loader that reads a matrix takes a processor from kernels so short.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from .probe_model import small_model

WIDTH, _LAYERS = 256, 4
"""Of the model: that of the smallest kernels that are timed."""
_LENGTH, _POSITION = 128, 64
_TURNS, _TURN_STEPS, _LOOKS = 16, 32, 12


class TinyModel:
    """The model with two engines that are ready to decode: one with all of it in memory, one that streams attention's matrices."""

    def __init__(self, path: Path, batches: Sequence[int]) -> None:
        """Writes the model and compiles what `batches` of sequences need."""
        from ..pipeline.engine import Engine
        from ..pipeline.options import EngineOptions

        self.store, self._batches = small_model(path, WIDTH, _LAYERS), batches
        with ExitStack() as opened:
            self._engines: dict[bool, Any] = {}
            for streamed in (False, True):
                plan = self.plan(max(batches), streamed=streamed)
                self._engines[streamed] = engine = opened.enter_context(Engine(self.store, EngineOptions(), plan=plan))
                for batch in batches:
                    engine.prepare(batch, _LENGTH, prompts=False)
            self._open = opened.pop_all()

    def fitted(self, device: Any, yardstick: Any) -> Any:
        """The `Device` with `cached_share` and `item_s` as this model's steps tell them.

        Args:
          device: with all else measured; of a machine whose caches keep the model, else nothing is concluded.
          yardstick: the machine's pace.
        """
        if not device.keeps(self.store.num_bytes):
            return device
        whole, passing = {}, {}
        for batch in self._batches:
            whole[batch], passing[batch] = self.steps_s(device, yardstick, batch)
        expected = {batch: self.expected_s(device, batch, streamed=False) for batch in self._batches}
        device = replace(device, cached_share={batch: min(1.0, whole[batch] / expected[batch]) for batch in self._batches})
        beyond = {batch: passing[batch] - self.expected_s(device, batch, streamed=True) for batch in self._batches}
        return replace(device, item_s={batch: max(0.0, beyond[batch]) / _LAYERS for batch in self._batches})

    def plan(self, batch: int, *, streamed: bool) -> Any:
        """Everything in memory, but attention's matrices where they are streamed."""
        from ..pipeline.options import EngineOptions
        from ..pipeline.plan import plan_from_options

        plan = plan_from_options(self.store, EngineOptions(ffn="resident", max_num_seqs=batch, max_model_len=_LENGTH))
        return replace(plan, streamed_qkv=(streamed,) * _LAYERS, streamed_out=(streamed,) * _LAYERS)

    def steps_s(self, device: Any, yardstick: Any, batch: int) -> tuple[float, float]:
        """Seconds of a step with everything in memory, and of one that streams, at the pace of the device's own figures.

        They run in turns, and what streams is told by how many times as long as the other it took just then. A shared machine is a fifth
        off for a turn or for a minute, and a look of some milliseconds beside a turn knows little of either.
        """
        paces, wholes, times = [], [], []
        for _ in range(_TURNS):
            wholes.append(self._turn_s(batch, streamed=False))
            paces.append(yardstick.cached_kernels(_LOOKS)[batch] / device.state.cached_kernel_s[batch])  # before anything is read
            times.append(self._turn_s(batch, streamed=True) / wholes[-1])
        whole = statistics.median(wholes) / statistics.median(paces)
        return whole, whole * statistics.median(times)

    def _turn_s(self, batch: int, *, streamed: bool) -> float:
        """Seconds of each of some steps."""
        engine = self._engines[streamed]
        engine.prepare(batch, _LENGTH, prompts=False)
        tokens, positions = np.full(batch, 7, np.int32), np.full(batch, _POSITION, np.int32)
        began = time.perf_counter()
        for _ in range(_TURN_STEPS):
            engine.decode(tokens, positions, np.ones(batch, bool))
        return (time.perf_counter() - began) / _TURN_STEPS

    def expected_s(self, device: Any, batch: int, *, streamed: bool) -> float:
        """What the cost model says of a step, at the device's own pace."""
        from ..pipeline.cost import CostModel
        from ..pipeline.hit_curves import assumed_curves
        from ..pipeline.options import EngineOptions

        model = CostModel(self.store, EngineOptions(), device, assumed_curves(self.store))
        return model.predict(self.plan(batch, streamed=streamed), batch, _POSITION).total_ms / 1e3

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
