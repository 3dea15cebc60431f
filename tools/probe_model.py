"""A small model run for real, as the last of what `inflash probe` measures: what the sum of a step's parts leaves out.

Each part of a step was timed on its own. In a run they follow one another, the interpreter is between them, and loaders have to share the
processors with kernels. So a small model with planted sparsity decodes, with all of its neurons in memory, with most, and with few, and
figures of the device are chosen so that the cost model says what these steps take.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.convert import convert
from ..storage.model_config import ModelConfig
from ..storage.store import Store
from ..storage.synthetic import Planting, SyntheticSource
from .synth import PREDICTOR, planted_predictors

_WIDTH, _LAYERS, _VOCABULARY, _LENGTH = 1024, 4, 4096, 64
_PROMPT, _POSITIONS = 16, 128
_TURNS, _TURN_STEPS, _WARM_STEPS = 3, 8, 6
_GATHERED = 0.25  # of the neurons that a kernel is compiled for at most: more than steps of these sequences name
_SLOTS = (1.5, 4.0)  # times what a step names: a cache as small as plans have, and one that misses little
_SHARES, _DELAYED_S = np.linspace(0.5, 1.0, 6), np.linspace(0, 4e-3, 21)  # that are tried
_ASKED_S = _DELAYED_S[::5]  # of those the model is asked about; between them its answers lie nearly on lines


def small_model(path: Path, width: int = _WIDTH, num_layers: int = _LAYERS) -> Store:
    """A store of 110 MB, unless said otherwise."""
    config = ModelConfig(
        family="opt", vocab_size=_VOCABULARY, d_model=width, d_ff=4 * width, num_layers=num_layers, num_heads=width // 64,
        max_positions=_POSITIONS, embed_dim=width, position_offset=2,
    )  # fmt: skip
    with SyntheticSource(config, "a small model", Planting()) as source:
        return convert(source, path, predictor_rank=0, predictors=planted_predictors(source))


class SmallModel:
    """The model with an engine that is ready to decode."""

    def __init__(self, path: Path, batches: Sequence[int]) -> None:
        """Writes the model and compiles what `batches` of sequences need."""
        from ..pipeline.engine import Engine
        from ..pipeline.options import EngineOptions
        from ..pipeline.plan import plan_from_options

        self._store, self._batches = small_model(path), batches
        self._options = EngineOptions(predictor=PREDICTOR, prefetch="none", cache_neurons=_GATHERED, merge_gap=0, path="sparse")
        plan = replace(plan_from_options(self._store, self._options), prompt_tokens=_PROMPT)
        self._engine = Engine(self._store, self._options, plan=plan)
        try:
            for batch in batches[1:]:
                self._engine.prepare(batch, _LENGTH, prompts=False)
            self._engine.prepare(batches[0], _LENGTH)
        except BaseException:
            self._engine.close()
            raise

    def fitted(self, device: Any, yardstick: Any) -> Any:
        """The `Device` with the figures that the model's steps tell.

        Those are how neurons are placed and asked for, what a layer takes beyond its parts, how late loaders begin, and the loaders'
        share.

        Args:
          device: with all else measured; those are nothing.
          yardstick: the machine's pace.
        """
        store, d_ff = self._store, self._store.config.d_ff
        steps = _Steps(self._engine, store, self._options)
        whole = {batch: steps.measure(yardstick, batch, d_ff) for batch in self._batches}
        missing: dict[int, list[MeasuredSteps]] = {}
        for batch in reversed(self._batches):
            named = whole[batch].named
            missing[batch] = [steps.measure(yardstick, batch, min(d_ff, round(times * named))) for times in _SLOTS]
        device = with_memory_management(device, list(whole.values()), [each for some in missing.values() for each in some])
        layer_s = {batch: max(0.0, each.beyond_s(device)) / store.config.num_layers for batch, each in whole.items()}
        return best_of(replace(device, layer_s=layer_s), missing)

    def __enter__(self) -> "SmallModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()


def with_memory_management(device: Any, whole: "Sequence[MeasuredSteps]", missing: "Sequence[MeasuredSteps]") -> Any:
    """The `Device` that places and asks for neurons as these steps did."""
    place = _line([each.named for each in whole], [each.memory_s(device) for each in whole])
    beyond = [max(each.memory_s(device) - place.seconds(each.named), 1e-6) for each in missing]
    return replace(device, placing=place, asking=_line([max(each.missed, 1.0) for each in missing], beyond))


def _line(sizes: Sequence[float], seconds: Sequence[float]) -> Any:
    """The rate whose line lies nearest to what calls of several sizes took, by shares of these times."""
    from ..pipeline.device import Rate

    design = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], axis=1) / np.asarray(seconds)[:, None]
    fixed, each = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)[0]
    if fixed < 0:
        fixed, each = 0.0, statistics.median(second / size for size, second in zip(sizes, seconds, strict=True))
    return Rate(fixed_s=float(fixed), bytes_per_s=1 / max(float(each), 1e-15))


def best_of(device: Any, missing: "Mapping[int, Sequence[MeasuredSteps]]") -> Any:
    """The `Device` with the `loader_share` and the `delayed_s` with which it knows best what steps with missing neurons took."""
    best: tuple[float, Any] | None = None
    for share in _SHARES.tolist():
        off, delayed_s = 0.0, {}
        for batch, measured in missing.items():
            asked = [replace(device, loader_share=share, delayed_s={batch: seconds}) for seconds in _ASKED_S.tolist()]
            tried = np.zeros(len(_DELAYED_S))
            for each in measured:
                beyond = np.interp(_DELAYED_S, _ASKED_S, [each.beyond_s(other) for other in asked])
                tried += (beyond / each.seconds) ** 2
            delayed_s[batch] = float(_DELAYED_S[tried.argmin()])
            off += float(tried.min())
        if best is None or off < best[0]:
            best = off, replace(device, loader_share=share, delayed_s=delayed_s)
    assert best is not None
    return best[1]


class MeasuredSteps:
    """Steps with so many slots, in turns, each told with the pace at which it was made.

    Attributes:
      named, missed: neurons that a layer's step names, and of those that have to be read.
      seconds: of a step.
    """

    def __init__(
        self, store: Store, options: Any, plan: Any, named: float, missed: float, turns: Sequence[tuple[float, float, Any]]
    ) -> None:
        from ..pipeline.hit_curves import HitCurves, LayerCurve

        self.named, self.missed, self.seconds = named, missed, statistics.median(seconds for seconds, _, _ in turns)
        flat = LayerCurve(named=named, guessed=0.0, slots=(1,), misses=(missed,), ahead=(0.0,), late=(missed,))
        self._curves = HitCurves(
            source="", predictor=PREDICTOR, prefetch="", batches={plan.num_seqs: (flat,) * store.config.num_layers}
        )
        self._store, self._options, self._plan, self._turns = store, options, plan, turns

    def memory_s(self, device: Any) -> float:
        """Seconds of memory management in a layer, at the pace of the device's own figures."""
        seconds = [memory * device.state.processor_s / state.processor_s for _, memory, state in self._turns]
        return statistics.median(seconds) / self._store.config.num_layers

    def beyond_s(self, device: Any) -> float:
        """Seconds of a step that the model does not know of, at the pace of the device's own figures."""
        from ..pipeline.cost import CostModel

        beyond = []
        for seconds, _, state in self._turns:
            model = CostModel(self._store, self._options, device.in_state(state), self._curves)
            expected = model.predict(self._plan, self._plan.num_seqs, _LENGTH // 2).total_ms / 1e3
            beyond.append((seconds - expected) * device.state.processor_s / state.processor_s)
        return statistics.median(beyond)


class _Steps:
    """Decodes random tokens on and on."""

    def __init__(self, engine: Any, store: Store, options: Any) -> None:
        self._engine, self._store, self._options, self._batch = engine, store, options, 1
        self._rng, self._at = np.random.default_rng(0), _PROMPT
        self._resize(store.config.d_ff)  # what streams by for a prompt stays
        engine.process_prompts([(0, self._tokens(_PROMPT))])

    def measure(self, yardstick: Any, batch: int, slots: int) -> MeasuredSteps:
        engine, layers = self._engine, self._store.config.num_layers
        self._batch = batch
        engine.prepare(batch, _LENGTH, prompts=False)
        self._resize(slots)
        self._run(_WARM_STEPS)
        before, turns = engine.times.copy(), []
        for _ in range(_TURNS):
            state = yardstick.measure(
                "kernel_s", "processor_s", *(["random_bytes_per_s"] if slots < self._store.config.d_ff else [])
            )
            managed = engine.times.memory_ns
            seconds = statistics.median(self._run(_TURN_STEPS))
            turns.append((seconds, (engine.times.memory_ns - managed) / 1e9 / _TURN_STEPS, state))
        steps = (engine.times.steps - before.steps) * layers
        missed = engine.times.misses - before.misses
        named = (missed + engine.times.hits - before.hits) / steps
        plan = replace(engine.plan, slots=(slots,) * layers, num_seqs=self._batch, max_length=_LENGTH)
        return MeasuredSteps(self._store, self._options, plan, named, missed / steps, turns)

    def _resize(self, slots: int) -> None:
        self._engine.neurons.cached.resize(dict.fromkeys(range(self._store.config.num_layers), slots))

    def _run(self, count: int) -> list[float]:
        """Seconds of each step."""
        seconds = []
        for _ in range(count):
            positions = np.full(self._batch, self._at, np.int32)
            began = time.perf_counter()
            self._engine.decode(self._tokens(self._batch), positions, np.ones(self._batch, bool))
            seconds.append(time.perf_counter() - began)
            self._at = _PROMPT + (self._at + 1 - _PROMPT) % (_LENGTH - _PROMPT)
        return seconds

    def _tokens(self, count: int) -> np.ndarray:
        return self._rng.integers(0, _VOCABULARY, count).astype(np.int32)
