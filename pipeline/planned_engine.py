"""An engine within a memory budget: planned when the first requests say how much KV cache they need, and corrected between requests."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..storage.store import Store
from .device_file import find_device, read_device
from .engine import Engine
from .fixed_shapes import capacity_for
from .hit_curves import find_curves
from .host_memory import available_bytes
from .options import EngineOptions
from .planner import PlannedRun, Planner
from .predictors import choose_predictor
from .step_times import StepTimes

RESERVE_BYTES = 256 << 20
"""What `memory="auto"` leaves to others, or a twentieth of what is free where that is more."""

_FEWEST_STEPS = 16  # that say where misses are
_WORTHWHILE = 0.02  # of all slots; moving fewer brings less than it costs


def open_planner(store: Store, options: EngineOptions, device_file: Path | None = None) -> tuple[Planner, list[str]]:
    """A planner with what is known of the machine and of the model, and sentences on what is not.

    Args:
      store, options: for what.
      device_file: figures of `inflash probe -o`; None: those that are kept for the store's disk.

    Raises:
      InflashError: the options name a predictor that the store lacks, or the file is none.
    """
    device, note = (read_device(device_file), "") if device_file else find_device(store.path)
    usable = [name for name, info in store.predictors.items() if not info.ahead]
    predictor = choose_predictor(store, options.predictor) if usable or options.predictor != "auto" else None
    curves = find_curves(store, predictor)
    notes = [note] if note else []
    if held_down := device.held_down():
        notes.append(f"when the disk was measured, {held_down}; run inflash probe {store.path} once it is not")
    if predictor is not None and not curves.predictor:
        notes.append(f"hit curves are {curves.source}")
    return Planner(store, options, device, curves), notes


def budget(options: EngineOptions) -> int:
    """The options' memory in bytes; "auto" is what is free, less a reserve, and what this process holds already."""
    assert options.memory is not None
    if options.memory != "auto":
        return int(options.memory)
    free = available_bytes()
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return held + free - max(RESERVE_BYTES, free // 20)


class PlannedEngine:
    """Opens an engine for requests, and another one when requests need more room than it was planned for.

    Attributes:
      planner: who decides.
      notes: sentences on what was assumed.
      planned: the plan that the engine runs, as it was made; None before there is one.
      engine: the engine; None before there is one.
      times: what all engines so far have cost.
    """

    def __init__(self, store: Store, options: EngineOptions) -> None:
        """Raises InflashError where not even one short sequence fits the budget."""
        self._store, self._options = store, options
        self._memory_bytes = budget(options)
        self.planner, self.notes = open_planner(store, options)
        self.planner.check(self._memory_bytes, 1, 1)
        self.planned: PlannedRun | None = None
        self.engine: Engine | None = None
        self.times = StepTimes()
        self._seen: dict[int, int] = {}
        self._seen_steps = 0

    def check_room(self, max_length: int) -> None:
        """Raises InflashError where not even one sequence of such a length fits."""
        self.planner.check(self._memory_bytes, 1, max_length)

    def open_for(self, num_seqs: int, max_length: int) -> Engine:
        """An engine with room for so many sequences, or for as many as the budget allows, of such a length.

        Raises:
          InflashError: not even one fits.
        """
        num_seqs = self.planner.fitting_seqs(self._memory_bytes, num_seqs, max_length)
        if self.engine is not None and self.planned is not None:
            if num_seqs <= self.planned.num_seqs and capacity_for(max_length) <= capacity_for(self.planned.max_length):
                self.correct()
                return self.engine
            num_seqs, max_length = max(num_seqs, self.planned.num_seqs), max(max_length, self.planned.max_length)
            num_seqs = self.planner.fitting_seqs(self._memory_bytes, num_seqs, max_length)
            self.engine.close()
        self.engine = None
        self.planned = self.planner.plan(self._memory_bytes, num_seqs, max_length)
        self.engine = Engine(self._store, self._options, plan=self.planned.plan, times=self.times)
        self._seen, self._seen_steps = {}, self.engine.times.steps
        return self.engine

    def correct(self) -> None:
        """Moves slots to where more was missed than the plan expected, if enough steps have said so."""
        assert self.engine is not None and self.planned is not None
        cached, steps = self.engine.neurons.cached, self.engine.times.steps - self._seen_steps
        if cached is None or steps < _FEWEST_STEPS or self._options.policy != "lfu":
            return
        missed = {layer: (count - self._seen.get(layer, 0)) / steps for layer, count in cached.missed.items()}
        self._seen, self._seen_steps = dict(cached.missed), self.engine.times.steps
        slots = self.planner.divide_again(replace(self.engine.plan, slots=self._slots_now()), missed)
        moved = sum(abs(slots[layer] - cached.slots[layer]) for layer in cached.slots) // 2
        if moved > _WORTHWHILE * sum(cached.slots.values()):
            cached.resize({layer: slots[layer] for layer in cached.slots})

    def _slots_now(self) -> tuple[int, ...]:
        assert self.engine is not None and self.engine.neurons.cached is not None
        now = self.engine.neurons.cached.slots
        return tuple(now.get(layer, count) for layer, count in enumerate(self.engine.plan.slots))

    def predicted(self) -> dict[str, Any] | None:
        """What the plan expects of a step, under the names of what is measured."""
        return None if self.planned is None else self.planned.predicted.to_json()

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
