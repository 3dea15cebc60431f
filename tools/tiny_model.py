"""A tiny model run for real: what a step takes of models that stay in the processor's caches.

Kernels that were timed one by one, each waited for, take longer than in a run, where the next is begun meanwhile; with matrices of a few
hundred KiB that is much of their time. And whatever else a shared machine does takes from such steps what it does not take from a kernel.
So `inflash probe` fits its figures to this model's steps, and `inflash bench plan` tells by them how fast the machine is.
"""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from .decoded_steps import DecodedSteps
from .probe_model import small_model

WIDTH, NUM_LAYERS = 256, 4
"""Of the model: that of the smallest kernels that are timed."""
LENGTH = 64
POSITION = LENGTH // 2  # on average
_STEPS = LENGTH  # of a turn at most, one after the other
_TURN_S = 0.12  # a machine that is a fifth off for some tens of milliseconds is not for all of it


class TinyModel:
    """The model with engines that are ready to decode: with all of it in memory, and with attention's matrices streamed."""

    def __init__(self, path: Path, batches: Sequence[int]) -> None:
        """Writes the model and compiles what `batches` of sequences need."""
        from ..pipeline.engine import Engine
        from ..pipeline.options import EngineOptions

        self.store, self.batches = small_model(path, WIDTH, NUM_LAYERS), batches
        with ExitStack() as opened:
            self._engines: dict[bool, Any] = {}
            for streamed in (False, True):
                plan = self.plan(max(batches), streamed=streamed)
                self._engines[streamed] = engine = opened.enter_context(Engine(self.store, EngineOptions(), plan=plan))
                for batch in batches:
                    engine.prepare(batch, LENGTH, prompts=False)
            self._open = opened.pop_all()

    def plan(self, batch: int, *, streamed: bool) -> Any:
        """Everything in memory, but attention's matrices where they are streamed."""
        from ..pipeline.options import EngineOptions
        from ..pipeline.plan import plan_from_options

        plan = plan_from_options(self.store, EngineOptions(ffn="resident", max_num_seqs=batch, max_model_len=LENGTH))
        return replace(plan, streamed_qkv=(streamed,) * NUM_LAYERS, streamed_out=(streamed,) * NUM_LAYERS)

    def step_s(self, batch: int, *, streamed: bool = False) -> float:
        """Seconds of a step: the median of a turn's."""
        engine = self._engines[streamed]
        engine.prepare(batch, LENGTH, prompts=False)
        token_ids = np.random.default_rng(batch).integers(self.store.config.vocab_size, size=(batch, LENGTH), dtype=np.int32)
        samples = DecodedSteps(engine, token_ids, 0, LENGTH).run(_TURN_S, _STEPS)
        return statistics.median(sample["total_ms"] for sample in samples) / 1e3

    def steps_s(self, *, streamed: bool) -> dict[int, float]:
        """`step_s` by number of sequences."""
        return {batch: self.step_s(batch, streamed=streamed) for batch in self.batches}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
