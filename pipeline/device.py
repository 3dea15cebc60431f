"""What a machine and its disk can do, in the few figures that the cost model needs.

`inflash probe` measures them, `device_file` keeps them. Reference: arXiv:2312.11514, 2.3 and 4.
"""

import math
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ..storage.read_rate import worthwhile_gap
from .machine_state import MachineState

KERNELS = ("attention", "keys and values", "head", "predictor", "two predictors", "gather", "block", "dense")
"""What a step calls: a layer's attention without what it looks back on, that, the output head, predictors, neurons by slot, streamed in
blocks, and all of a layer's."""

GROUP_SIZE = 8
"""Sequences that a native kernel takes through picked neurons together, those of each group only through what they name."""

_HARMLESS_DEPTH = 16  # reads under way that cost nothing where fewer would do
_SCALING_DEPTH, _SCALES = 64, 3.0
"""So many small reads under way get at least so many times the rate of one, of any SSD that is left alone; of ours 7 to 12 times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A call takes `fixed_s` and `bytes_per_s` of what it reads."""

    fixed_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.fixed_s + num_bytes / self.bytes_per_s

    def slower(self, times: float) -> "Rate":
        return Rate(fixed_s=times * self.fixed_s, bytes_per_s=self.bytes_per_s / times)


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """What calls of a kernel take.

    Attributes:
      points: bytes of what a call reads, ascending, and its seconds; between them a line that goes on beyond, before them the
        first.
    """

    points: tuple[tuple[float, float], ...]

    def seconds(self, num_bytes: float) -> float:
        if num_bytes <= self.points[0][0]:
            return self.points[0][1]
        if len(self.points) == 1:
            ((most, seconds),) = self.points
            return seconds * num_bytes / most
        lines = list(pairwise(self.points))
        (below, first), (above, second) = next((line for line in lines if num_bytes <= line[1][0]), lines[-1])
        return first + (second - first) * (num_bytes - below) / (above - below)

    def slower(self, times: float) -> "KernelTimes":
        return KernelTimes(tuple((size, times * seconds) for size, seconds in self.points))

    @classmethod
    def of(cls, measured: Iterable[tuple[float, float]]) -> "KernelTimes":
        """Bytes and seconds as measured; a larger call that seemed faster takes as long as the smaller one."""
        sizes, seconds = zip(*sorted(measured), strict=True)
        return cls(tuple(zip(sizes, accumulate(seconds, max), strict=True)))

    @classmethod
    def along(cls, rate: Rate, most: int = 1 << 40) -> "KernelTimes":
        return cls(tuple((float(size), rate.seconds(size)) for size in (0, most)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPoint:
    """Random direct reads of `size` bytes with `depth` of them under way."""

    size: int
    depth: int
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Device:
    """Figures of one machine and disk.

    Attributes:
      state: how fast the machine was when it had these figures.
      machine: what they were measured on, see `machine_of`; empty where they are assumed.
      cores: processors that this process may use.
      cache_bytes: of their last-level cache; 0 where the system does not say.
      read_curve: the disk's.
      stream_bytes_per_s: of neurons that a loader reads in order, rows apart; matrices come at the state's.
      dram_bytes_per_s: by number of threads that read.
      kernels: for each of KERNELS what it takes, by number of sequences.
      cached_share: of a kernel's time, by number of sequences, that it takes in a run of a model that stays in the processor's caches.
      item_s: of a matrix that is streamed, or a part of one, by number of sequences, beyond reading it and computing.
      layer_s: of a layer with a cache, by number of sequences, beyond all these: what is between kernels.
      delayed_s: by number of sequences, until a loader begins what it is asked for while kernels have the processors.
      placing: of the neuron cache: `fixed_s` a call, and "bytes" are neurons.
      asking: of the engine's time for a request to loaders, and for giving out its slots, beyond placing; "bytes" are neurons.
      request_s: from asking a loader for one neuron until it is there, beyond the read itself.
      loader_share: that a loader reaches of the disk's own rate of random reads, or of what its processor time allows.
      read_cpu_s: processor time of a loader for a random read.
      stream_cpu_s: that kernels lose for a byte that streams by, to the loader and to whoever else works for a read.
    """

    state: MachineState
    machine: Mapping[str, str]
    cores: int
    cache_bytes: int
    read_curve: tuple[ReadPoint, ...]
    stream_bytes_per_s: float
    dram_bytes_per_s: Mapping[int, float]
    kernels: Mapping[str, Mapping[int, KernelTimes]]
    cached_share: Mapping[int, float]
    item_s: Mapping[int, float]
    layer_s: Mapping[int, float]
    delayed_s: Mapping[int, float]
    placing: Rate
    asking: Rate
    request_s: float
    loader_share: float
    read_cpu_s: float
    stream_cpu_s: float

    def kernel_s(self, name: str, num_seqs: int, num_bytes: float) -> float:
        """Seconds of a call for so many sequences: between those that were measured, and beyond, along a line."""
        times = self.kernels[name]
        batches = sorted(times)
        low = max((batch for batch in batches if batch <= num_seqs), default=batches[0])
        high = min((batch for batch in batches if batch > low), default=low)
        first, second = times[low].seconds(num_bytes), times[high].seconds(num_bytes)
        if high == low:
            return first * max(1.0, num_seqs / low) if num_seqs > low else first
        return first + (second - first) * (num_seqs - low) / (high - low)

    def keeps(self, model_bytes: float) -> bool:
        """Whether the processor's caches keep a model from step to step: half of the last one does."""
        return model_bytes <= self.cache_bytes / 2

    def goes_by_steps(self, model_bytes: float) -> bool:
        """Whether a model's pace is that of another one's steps, both kept by the caches, rather than that of memory."""
        return self.keeps(model_bytes) and bool(self.state.cached_step_s)

    def for_model(self, model_bytes: float) -> "Device":
        """With the kernels as they are in a run of a model of this size."""
        if not self.keeps(model_bytes):
            return self
        kernels = {
            name: {batch: each.slower(_for_batch(self.cached_share, batch)) for batch, each in times.items()}
            for name, times in self.kernels.items()
        }
        return replace(self, kernels=kernels)

    def matrix_s(self, num_seqs: int) -> float:
        """`item_s` for so many sequences."""
        return _for_batch(self.item_s, num_seqs)

    def between_s(self, num_seqs: int) -> float:
        """`layer_s` for so many sequences."""
        return _for_batch(self.layer_s, num_seqs)

    def delay_s(self, num_seqs: int) -> float:
        """`delayed_s` for so many sequences."""
        return _for_batch(self.delayed_s, num_seqs)

    def gather_s(self, num_seqs: int, num_bytes: float, group_share: float) -> float:
        """`kernel_s` of neurons by slot that each sequence names some of; a group names `group_share` of what all do together."""
        if num_seqs <= GROUP_SIZE or self.machine.get("kernels") != "native":
            return self.kernel_s("gather", num_seqs, num_bytes)
        return self.kernel_s("gather", GROUP_SIZE, num_seqs / GROUP_SIZE * group_share * num_bytes)

    def read_s(self, reads: float, size: int, depth: int, loaders: int = 1) -> float:
        """Seconds until so many random reads are back that loaders were asked for at once; `depth` is of all of them together."""
        if reads <= 0:
            return 0.0
        under_way = max(1.0, min(reads, depth))
        possible = min(self.rate_at(size, under_way), loaders * size / max(self.read_cpu_s, 1e-9))
        in_flight = reads * size / (self.loader_share * possible)
        return self.request_s + max(size / self.rate_at(size, 1), in_flight)

    def rate_at(self, size: float, depth: float) -> float:
        """Bytes a second from the curve, between its points in logarithms; flat beyond them."""
        sizes, depths, logarithms = self._rates
        (s0, s1, s), (d0, d1, d) = _between(sizes, size), _between(depths, depth)
        rows = [logarithms[a, d0] + (logarithms[a, d1] - logarithms[a, d0]) * d for a in (s0, s1)]
        return math.exp(rows[0] + (rows[1] - rows[0]) * s)

    @cached_property
    def _rates(self) -> tuple[list[int], list[int], dict[tuple[int, int], float]]:
        """The curve's sizes and depths, ascending, and the logarithms of its rates by both."""
        rates = {(point.size, point.depth): math.log(point.bytes_per_s) for point in self.read_curve}
        return sorted({size for size, _ in rates}), sorted({depth for _, depth in rates}), rates

    def best_depth(self, size: int) -> int:
        """The fewest reads under way that get 97 % of the best rate, and no fewer than cost nothing.

        A disk whose rate was held down while it was measured gives that rate whatever is under way, and ten times as much an hour later.
        """
        measured = sorted({point.depth for point in self.read_curve})
        depths = [depth for depth in measured if depth >= _HARMLESS_DEPTH] or measured[-1:]
        best = max(self.rate_at(size, depth) for depth in depths)
        return next(depth for depth in depths if self.rate_at(size, depth) >= 0.97 * best)

    def held_down(self) -> str:
        """What the curve looks like where somebody bounds the disk's rate, in a clause; "" where nobody seems to."""
        size = min(point.size for point in self.read_curve)
        rates = {point.depth: point.bytes_per_s for point in self.read_curve if point.size == size}
        shallow, deep = min(rates), max(rates)
        if shallow > 1 or deep < _SCALING_DEPTH or rates[deep] >= _SCALES * rates[shallow]:
            return ""
        return (
            f"{deep} reads of {size >> 10} KiB under way got {rates[deep] / 1e6:.0f} MB/s where one got {rates[shallow] / 1e6:.0f}: "
            "its provider, a cgroup or another program seems to hold the disk down, or it is no SSD"
        )

    def worthwhile_gap(self) -> int:
        """Bytes that cost no more to read along than another read costs."""
        return worthwhile_gap((point.size, point.bytes_per_s) for point in self.read_curve)

    def in_state(self, now: MachineState, model_bytes: float = math.inf) -> "Device":
        """The same machine when it is as fast as `now` says: each figure changed as the piece of work is that it is most like.

        Args:
          now: measured at the time in question.
          model_bytes: of a model that is to run, see `goes_by_steps`.
        """
        before, processor = self.state, now.processor_s / self.state.processor_s
        random = now.random_bytes_per_s / before.random_bytes_per_s
        kernels, items, request = _ratios(now.kernel_s, before.kernel_s), dict.fromkeys(self.item_s, processor), processor
        if self.goes_by_steps(model_bytes):
            kernels |= _ratios(now.cached_step_s, before.cached_step_s)
            # Its matrices are so short that handing them over takes longer than the disk.
            items = _ratios(now.streamed_step_s, before.streamed_step_s)
            request = statistics.geometric_mean(items.values())
            now = replace(now, stream_bytes_per_s=before.stream_bytes_per_s / request)
        stream = now.stream_bytes_per_s / before.stream_bytes_per_s
        return replace(
            self,
            state=now,
            read_curve=tuple(replace(point, bytes_per_s=random * point.bytes_per_s) for point in self.read_curve),
            stream_bytes_per_s=stream * self.stream_bytes_per_s,
            kernels={
                name: {batch: each.slower(kernels[batch]) for batch, each in times.items()}
                for name, times in self.kernels.items()
            },
            item_s={batch: items[batch] * seconds for batch, seconds in self.item_s.items()},
            layer_s={batch: processor * seconds for batch, seconds in self.layer_s.items()},
            delayed_s={batch: processor * seconds for batch, seconds in self.delayed_s.items()},
            placing=self.placing.slower(processor),
            asking=self.asking.slower(processor),
            request_s=request * self.request_s,
            read_cpu_s=processor * self.read_cpu_s,
            stream_cpu_s=processor * self.stream_cpu_s,
        )

    def to_json(self) -> dict[str, Any]:
        return {"machine": dict(self.machine)} | {key: value for key, value in asdict(self).items() if key != "machine"}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Device":
        fields = dict(document)
        fields["state"] = MachineState.from_json(fields["state"])
        fields["read_curve"] = tuple(ReadPoint(**point) for point in fields["read_curve"])
        fields["dram_bytes_per_s"] = {int(threads): rate for threads, rate in fields["dram_bytes_per_s"].items()}
        for name in ("cached_share", "item_s", "layer_s", "delayed_s"):
            fields[name] = {int(batch): seconds for batch, seconds in fields[name].items()}
        fields["kernels"] = {
            name: {int(batch): KernelTimes(tuple((size, s) for size, s in each["points"])) for batch, each in times.items()}
            for name, times in fields["kernels"].items()
        }
        return cls(**{**fields, "placing": Rate(**fields["placing"]), "asking": Rate(**fields["asking"])})


def _for_batch(values: Mapping[int, float], num_seqs: int) -> float:
    """Between the numbers of sequences that there are values for; beyond them the nearest."""
    batches = sorted(values)
    return float(np.interp(num_seqs, batches, [values[batch] for batch in batches]))


def _between(values: list[int], wanted: float) -> tuple[int, int, float]:
    """The neighbours of `wanted` among ascending values, and how far it is from the first to the second, in logarithms."""
    low = max((value for value in values if value <= wanted), default=values[0])
    high = min((value for value in values if value > low), default=low)
    if high == low or wanted <= low:
        return low, high, 0.0
    return low, high, math.log(min(wanted, high) / low) / math.log(high / low)


def _ratios(now: Mapping[int, float], before: Mapping[int, float]) -> dict[int, float]:
    return {batch: now[batch] / seconds for batch, seconds in before.items()}


def assumed_device() -> Device:
    """Figures like those of a two-core virtual machine with a virtio disk, for where nothing was measured."""
    curve = {(4 << 10, 1): 40e6, (4 << 10, 128): 250e6, (16 << 10, 1): 130e6, (16 << 10, 128): 700e6}
    curve |= {(128 << 10, 1): 500e6, (128 << 10, 128): 1500e6, (1 << 20, 1): 900e6, (1 << 20, 128): 1500e6}
    rates = {"attention": 23e9, "keys and values": 20e9, "head": 26e9, "predictor": 20e9, "two predictors": 20e9, "gather": 14e9}
    rates |= {"block": 15e9, "dense": 15e9}
    return Device(
        state=MachineState(
            kernel_s={1: 5.8e-3, 8: 1.2e-2},
            cached_step_s={1: 1.5e-3, 8: 2.5e-3},
            streamed_step_s={1: 3.5e-3, 8: 5e-3},
            processor_s=5e-3,
            random_bytes_per_s=450e6,
            stream_bytes_per_s=1.4e9,
        ),
        machine={},
        cores=os.cpu_count() or 1,
        cache_bytes=0,
        read_curve=tuple(ReadPoint(size=size, depth=depth, bytes_per_s=rate) for (size, depth), rate in curve.items()),
        stream_bytes_per_s=1.3e9,
        dram_bytes_per_s={1: 20e9, 2: 27e9},
        kernels={
            name: {
                batch: KernelTimes.along(Rate(fixed_s=2e-4, bytes_per_s=rate / (1 if batch == 1 else 1.6))) for batch in (1, 8)
            }
            for name, rate in rates.items()
        },
        cached_share={1: 0.8, 8: 0.9},
        item_s={1: 2e-4, 8: 3e-4},
        layer_s={1: 1e-4, 8: 2e-4},
        delayed_s={1: 5e-4, 8: 1e-3},
        placing=Rate(fixed_s=1.2e-4, bytes_per_s=1e7),
        asking=Rate(fixed_s=1e-4, bytes_per_s=2e6),
        request_s=1e-4,
        loader_share=0.95,
        read_cpu_s=9e-6,
        stream_cpu_s=1.5e-10,
    )
