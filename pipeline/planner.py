"""Turns one memory budget into a plan: of the ways to run a model that fit, the one that the cost model finds fastest.

What a byte of memory saves differs. A weight of the attention or the head is needed for every token, a neuron for some: so matrices come
first, as many as there is room for, and what is left goes to the neuron caches, to whichever layer's hit curve falls most for it. How many
layers of attention are streamed, whether the head is, and whether neurons are guessed, predicted or all streamed, is tried out.
Reference: arXiv:2312.11514, 3.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..errors import InflashError
from ..storage.store import Store
from .cost import CostModel, StepCost
from .device import Device
from .fixed_shapes import capacity_for
from .hit_curves import HitCurves
from .memory_parts import total_bytes
from .options import EngineOptions
from .plan import (
    BLOCK_BUFFERS,
    BLOCK_BYTES,
    CACHED,
    FEW_BLOCK_BUFFERS,
    PROMPT_TOKENS,
    RESIDENT,
    STREAMED,
    Plan,
    plan_from_options,
)
from .predictors import choose_predictor, choose_prefetch

_ATTENTION_STEPS = 8  # numbers of streamed matrices that are tried at first, besides none; then those around the best
_SLOT_STEPS = 64  # of a layer's neurons
_SMALL_BLOCK_BYTES = 2 << 20
_FEW_ROWS = 512  # of a block: with half as many, products for prompts take up to half as long again, see docs/performance.md
_MOST_DEPTH = 128
_MOST_SCALE = 10.0  # that a few steps may change a curve by


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A plan, what it was made for, and what to expect of it.

    Attributes:
      plan: it.
      memory_bytes: the budget.
      used_bytes: what the run will hold.
      least_bytes: the smallest budget that would do for as many sequences.
      num_seqs, max_length, positions: sequences, the longest of them, and the positions that `predicted` looks back on.
      predicted: a step.
    """

    plan: Plan
    memory_bytes: int
    used_bytes: int
    least_bytes: int
    num_seqs: int
    max_length: int
    positions: int
    predicted: StepCost


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A plan, the frame that it was made from, and what a step of it costs."""

    frame: Plan
    plan: Plan
    cost: StepCost


class Planner:
    """Plans for one store. What the options say other than their defaults is kept."""

    def __init__(self, store: Store, options: EngineOptions, device: Device, curves: HitCurves) -> None:
        """Raises InflashError where the store lacks the predictor that the options name."""
        self.store, self.options, self.device, self.curves = store, options, device, curves
        self.cost = CostModel(store, options, device, curves)
        self._frames_of: dict[tuple[int, int], list[tuple[Plan, int]]] = {}
        self._given = plan_from_options(store, options) if self._is_given("ffn") and options.ffn != "sparse" else None

    def plan(self, memory_bytes: int, num_seqs: int, max_length: int, positions: int | None = None) -> PlannedRun:
        """The fastest plan within a budget.

        Args:
          memory_bytes: for everything: weights, caches, KV cache, the program and its loaders.
          num_seqs, max_length: sequences decoded together, and the longest.
          positions: that a step looks back on; None: half of the longest.

        Raises:
          InflashError: nothing fits; it names the least that would do.
        """
        self.check(memory_bytes, num_seqs, max_length)
        positions = max_length // 2 if positions is None else positions
        best = self._fastest(self._sized_frames(num_seqs, max_length), memory_bytes, positions, None)
        assert best is not None
        best = self._fastest(self._sized(self._around(best.frame)), memory_bytes, positions, best) or best
        plan, cost = best.plan, best.cost
        return PlannedRun(
            plan=plan,
            memory_bytes=memory_bytes,
            used_bytes=total_bytes(self.store, self.options, plan),
            least_bytes=self.least_bytes(num_seqs, max_length),
            num_seqs=num_seqs,
            max_length=max_length,
            positions=positions,
            predicted=cost,
        )

    def _fastest(
        self, frames: Iterable[tuple[Plan, int]], memory_bytes: int, positions: int, best: _Candidate | None
    ) -> _Candidate | None:
        """What comes of these frames with the budget's rest, where it is faster than the best so far; else that."""
        for frame, frame_bytes in frames:
            if (plan := self._filled(frame, memory_bytes - frame_bytes)) is None:
                continue
            cost = self.cost.predict_below(plan, frame.num_seqs, positions, best.cost.total_ms if best else math.inf)
            if cost is not None and (best is None or cost.total_ms < best.cost.total_ms):
                best = _Candidate(frame=frame, plan=plan, cost=cost)
        return best

    def check(self, memory_bytes: int, num_seqs: int, max_length: int) -> None:
        """Raises InflashError, with the least that would do, where nothing fits a budget."""
        if (least := self.least_bytes(num_seqs, max_length)) > memory_bytes:
            raise InflashError(
                f"memory: {num_seqs} x {max_length} tokens need at least {math.ceil(least / 2**20)} MiB, found a budget of "
                f"{memory_bytes / 2**20:.0f} MiB; give more memory, or ask for shorter or fewer sequences"
            )

    def divide_again(self, plan: Plan, missed: dict[int, float]) -> tuple[int, ...]:
        """The plan's slots divided anew, by curves that are scaled to what layers have missed a step.

        Args:
          plan: as it runs.
          missed: neurons a step that layers read in the end, guessed or not.
        """
        curves, frame = self.curves.of(plan.num_seqs), replace(plan, slots=self._fewest_slots(plan.ffn, plan.num_seqs))
        scales = {}
        for layer, count in missed.items():
            expected = float(np.interp(plan.slots[layer], curves[layer].slots, self._read(layer, frame)))
            scales[layer] = float(np.clip((count + 1) / (expected + 1), 1 / _MOST_SCALE, _MOST_SCALE))
        room = (sum(plan.slots) - sum(frame.slots)) * self.store.bundles.bundle_bytes
        return plan.slots if room <= 0 else self._cached_with(frame, room, scales).slots

    def least_bytes(self, num_seqs: int, max_length: int) -> int:
        """The smallest budget that `plan` accepts."""
        return min(num_bytes for _, num_bytes in self._sized_frames(num_seqs, max_length))

    def most_bytes(self, num_seqs: int, max_length: int) -> int:
        """A budget beyond which more memory brings nothing."""
        everything = self.store.config.num_layers * self.store.bundles.layer_bytes
        return max(
            num_bytes + everything - sum(frame.slots) * self.store.bundles.bundle_bytes
            for frame, num_bytes in self._sized_frames(num_seqs, max_length)
        )

    def fits(self, plan: Plan, memory_bytes: int) -> bool:
        return total_bytes(self.store, self.options, plan) <= memory_bytes

    def alternatives(self, planned: PlannedRun) -> Iterator[tuple[str, Plan]]:
        """Other splits of the same budget: more or less attention in memory, guesses or none, the same slots for all layers."""
        plan, num_layers = planned.plan, self.store.config.num_layers
        streamed = _streamed_matrices(plan)
        for change in (-6, 6):
            count = min(max(streamed + change, 0), 2 * num_layers)
            frame = replace(plan, **_attention(count, num_layers), slots=self._fewest_slots(plan.ffn, planned.num_seqs))
            room = planned.memory_bytes - total_bytes(self.store, self.options, frame)
            other = self._filled(frame, room) if CACHED in plan.ffn and count != streamed else None
            if other is not None:
                yield f"{count} of attention's matrices streamed", other
        if plan.prefetch is not None:
            frame = replace(plan, prefetch=None, slots=self._fewest_slots(plan.ffn, planned.num_seqs))
            if (other := self._filled(frame, planned.memory_bytes - total_bytes(self.store, self.options, frame))) is not None:
                yield "nothing read before its layer", other
        if len(set(plan.slots)) > 1 and RESIDENT not in plan.ffn:
            yield "the same slots for every layer", replace(plan, slots=(sum(plan.slots) // num_layers,) * num_layers)

    def fitting_seqs(self, memory_bytes: int, num_seqs: int, max_length: int) -> int:
        """The largest power of two of sequences, up to `num_seqs`, for which there is room; 1 where there is none."""
        while num_seqs > 1 and self.least_bytes(num_seqs, max_length) > memory_bytes:
            num_seqs = 1 << ((num_seqs - 1).bit_length() - 1)
        return num_seqs

    def _is_given(self, *names: str) -> bool:
        defaults = EngineOptions()
        return any(getattr(self.options, name) != getattr(defaults, name) for name in names)

    @cached_property
    def _reads(self) -> dict[str, int]:
        """How neurons are read: deep enough and across gaps that pay, by the disk's curve."""
        options, size = self.options, self.store.bundles.bundle_bytes
        gap = self.device.worthwhile_gap() // size * size
        return {
            "loaders": options.loaders,
            "queue_depth": options.queue_depth
            if self._is_given("queue_depth")
            else min(self.device.best_depth(size), _MOST_DEPTH),
            "merge_gap": options.merge_gap if self._is_given("merge_gap") else gap,
        }

    def _sized_frames(self, num_seqs: int, max_length: int) -> list[tuple[Plan, int]]:
        """`_frames` with the bytes that each holds."""
        key = (num_seqs, max_length)
        if key not in self._frames_of:
            self._frames_of[key] = list(self._sized(self._frames(num_seqs, max_length)))
        return self._frames_of[key]

    def _sized(self, frames: Iterable[Plan]) -> Iterator[tuple[Plan, int]]:
        return ((frame, total_bytes(self.store, self.options, frame)) for frame in frames)

    def _frames(self, num_seqs: int, max_length: int) -> Iterator[Plan]:
        """Plans with as little memory as their kind can do with; which ones does not depend on the budget."""
        num_layers = self.store.config.num_layers
        room = {
            "num_seqs": num_seqs,
            "max_length": max_length,
            "kv_positions": num_seqs * capacity_for(max_length),
            "prompt_tokens": min(PROMPT_TOKENS, num_seqs * max_length),
            **self._reads,
        }
        if self._given is not None:
            yield replace(self._given, **room)
            return
        for count in self._attention_counts:
            attention = _attention(count, num_layers)
            for head in (False, True):
                for ways in self._ways(num_seqs):
                    yield Plan(**attention, streamed_head=head, **{**room, **ways})

    def _around(self, frame: Plan) -> Iterator[Plan]:
        """The frame with other numbers of streamed matrices, up to those that were tried before."""
        if self._given is not None:
            return
        counts, tried = self._attention_counts, _streamed_matrices(frame)
        place, num_layers = counts.index(tried), self.store.config.num_layers
        for count in range(counts[max(place - 1, 0)], counts[min(place + 1, len(counts) - 1)] + 1):
            if count not in counts:
                yield replace(frame, **_attention(count, num_layers))

    @property
    def _attention_counts(self) -> list[int]:
        shares = np.linspace(0, 1, _ATTENTION_STEPS + 1)
        return sorted({round(share * 2 * self.store.config.num_layers) for share in shares.tolist()})

    def _ways(self, num_seqs: int) -> Iterator[dict]:
        """The ways of the neurons, with the fewest slots that each can do with."""
        num_layers, d_ff = self.store.config.num_layers, self.store.config.d_ff
        dense = self.options.path != "sparse" and not self._is_given("predictor", "cache_neurons", "policy")
        few = {"block_bytes": self._small_block_bytes, "block_buffers": FEW_BLOCK_BUFFERS if num_seqs == 1 else BLOCK_BUFFERS}
        for blocks in (few, {"block_bytes": BLOCK_BYTES}):
            if dense:
                streamed = {"ffn": (STREAMED,) * num_layers, "slots": (0,) * num_layers, "predictor": None, "prefetch": None}
                yield {**streamed, **blocks}
        if dense:
            yield {
                "ffn": (RESIDENT,) * num_layers,
                "slots": (d_ff,) * num_layers,
                "predictor": None,
                "prefetch": None,
                **few,
            }
        if dense and self.options.path == "dense":
            return
        try:
            predictor = choose_predictor(self.store, self.options.predictor)
        except InflashError:
            if self._is_given("predictor") or self._is_given("ffn"):
                raise
            return
        prefetches = {choose_prefetch(self.store, self.options.prefetch, predictor)}
        if not self._is_given("prefetch"):
            prefetches.add(None)
        for prefetch in sorted(prefetches, key=str):
            for ffn in self._mixtures(num_seqs):
                yield {
                    "ffn": ffn,
                    "slots": self._fewest_slots(ffn, num_seqs),
                    "predictor": predictor,
                    "prefetch": prefetch,
                    **few,
                }

    @property
    def _small_block_bytes(self) -> int:
        return min(BLOCK_BYTES, max(_SMALL_BLOCK_BYTES, _FEW_ROWS * self.store.bundles.bundle_bytes))

    def _mixtures(self, num_seqs: int) -> list[tuple[str, ...]]:
        """All layers cached; and, where steps name much, the layers streamed that name most.

        With several sequences the engine itself measures which cached layers had better be read in order, see `path_choice`.
        """
        curves, d_ff = self.curves.of(num_seqs), self.store.config.d_ff
        mixtures = [(CACHED,) * len(curves)]
        if self.options.path == "sparse" or num_seqs > 1:
            return mixtures
        dense = sorted(
            (layer for layer, curve in enumerate(curves) if curve.named > 0.2 * d_ff), key=lambda layer: -curves[layer].named
        )
        for count in {len(dense) // 4, len(dense) // 2, len(dense)} - {0, len(curves)}:
            chosen = dense[:count]
            mixtures.append(tuple(STREAMED if layer in chosen else CACHED for layer in range(len(curves))))
        return mixtures

    def _fewest_slots(self, ffn: tuple[str, ...], num_seqs: int) -> tuple[int, ...]:
        every = {STREAMED: 0, RESIDENT: self.store.config.d_ff}
        return tuple(self._fewest(layer, num_seqs) if way == CACHED else every[way] for layer, way in enumerate(ffn))

    def _fewest(self, layer: int, num_seqs: int) -> int:
        """Slots that a layer's cache needs for a step to go through in one turn."""
        d_ff = self.store.config.d_ff
        if self._is_given("cache_neurons"):
            return self.options.cache_slots(d_ff)
        return min(d_ff, self._step * -(-self.curves.of(num_seqs)[layer].slots[0] // self._step))

    @property
    def _step(self) -> int:
        return max(1, self.store.config.d_ff // _SLOT_STEPS)

    def _filled(self, frame: Plan, room: int) -> Plan | None:
        """The frame with so many more bytes given to the layers; None where it is too large already."""
        if room < 0:
            return None
        if self._given is not None or self._is_given("cache_neurons"):
            return frame
        if CACHED in frame.ffn:
            return self._cached_with(frame, room)
        if STREAMED in frame.ffn:
            return self._resident_with(frame, room)
        return frame

    def _read(self, layer: int, plan: Plan) -> np.ndarray:
        """Neurons that a layer reads a step, at the sizes of its curve."""
        curve = self.curves.of(plan.num_seqs)[layer]
        return (
            np.asarray(curve.misses) if plan.prefetch is None or not layer else np.asarray(curve.late) + np.asarray(curve.ahead)
        )

    def _cached_with(self, frame: Plan, room: int, scales: dict[int, float] | None = None) -> Plan:
        """Slots in steps, each to the layer that then reads least; `scales` are factors of the curves."""
        curves, d_ff, step = self.curves.of(frame.num_seqs), self.store.config.d_ff, self._step
        gains, layers = [], []
        for layer in frame.layers(CACHED):
            sizes = np.minimum(frame.slots[layer] + step * np.arange(-(-(d_ff - frame.slots[layer]) // step) + 1), d_ff)
            misses = (scales or {}).get(layer, 1.0) * np.interp(sizes, curves[layer].slots, self._read(layer, frame))
            gains.append(_concave(misses[:-1] - misses[1:]))
            layers.append(np.full(len(sizes) - 1, layer))
        order = np.argsort(-np.concatenate(gains), kind="stable")
        affordable = room // (step * self.store.bundles.bundle_bytes)
        given = np.bincount(np.concatenate(layers)[order][:affordable], minlength=len(frame.ffn))
        slots = tuple(min(d_ff, count + step * int(more)) for count, more in zip(frame.slots, given, strict=True))
        return replace(frame, slots=slots)

    def _resident_with(self, frame: Plan, room: int) -> Plan:
        """As many layers' neurons in memory as there is room for, spread so that the disk has work throughout."""
        num_layers = self.store.config.num_layers
        d_ff, before = self.store.config.d_ff, total_bytes(self.store, self.options, frame)
        for count in range(min(num_layers - 1, room // self.store.bundles.layer_bytes), 0, -1):
            resident = _spread(count, num_layers)
            plan = replace(
                frame,
                ffn=tuple(RESIDENT if inside else STREAMED for inside in resident),
                slots=tuple(d_ff if inside else 0 for inside in resident),
            )
            if total_bytes(self.store, self.options, plan) - before <= room:  # a whole layer's product needs room itself
                return plan
        return frame


def _attention(count: int, num_layers: int) -> dict[str, tuple[bool, ...]]:
    """So many of the attention's matrices streamed: output projections, as their buffers are small, and then the others, too."""
    out = min(count, num_layers)
    return {"streamed_qkv": _spread(count - out, num_layers), "streamed_out": _spread(out, num_layers)}


def _streamed_matrices(plan: Plan) -> int:
    return sum(plan.streamed_qkv) + sum(plan.streamed_out)


def _spread(count: int, total: int) -> tuple[bool, ...]:
    """`count` of `total` places, as evenly as may be."""
    return tuple((place + 1) * count // total > place * count // total for place in range(total))


def _concave(gains: np.ndarray) -> np.ndarray:
    """Gains made to fall: a step that brings more than those before it is taken together with them."""
    falling: list[list[float]] = []
    for gain in gains.tolist():
        falling.append([gain, 1])
        while len(falling) > 1 and falling[-2][0] < falling[-1][0]:
            (a, m), (b, n) = falling[-2:]
            falling[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return np.repeat([gain for gain, _ in falling], [int(count) for _, count in falling])
