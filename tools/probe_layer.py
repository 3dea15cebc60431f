"""How layers stream through the engine's own parts, and what their neurons cost by slot, found in a cache or fetched by loaders.

A line through what calls of several sizes take gives what a call costs and what a byte does.
"""

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.read_rate import read_rate
from ..storage.store import Store

_HITS = (64, 512, 2048)  # predicted neurons of a step
_REPETITIONS = 10
_SWEPT_BYTES = 48 << 20
_STREAMED_BYTES, _MOST_STREAMED, _WARMED_BYTES = 256 << 20, 64, 2 << 30
_FETCHED = 1024  # neurons that loaders are asked for at once
_QUEUE_S = 0.1  # that the read queue alone is looked at, beside loaders


def _line(sizes: Sequence[float], seconds: Sequence[float]) -> Any:
    """The rate whose line lies nearest to what calls of several sizes took, by shares of these times."""
    from ..pipeline.device import Rate

    design = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], axis=1) / np.asarray(seconds)[:, None]
    fixed, each = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)[0]
    if fixed < 0:
        fixed, each = 0.0, statistics.median(second / size for size, second in zip(sizes, seconds, strict=True))
    return Rate(fixed_s=float(fixed), bytes_per_s=1 / max(float(each), 1e-15))


class _Layer:
    """The engine's ways through neurons, on a store's layers, with loaders."""

    def __init__(self, store: Store, way: str, slots: int) -> None:
        from ..pipeline import native_library
        from ..pipeline.layered_feed_forward import LayeredFeedForward
        from ..pipeline.loader_pool import LoaderPool
        from ..pipeline.neuron_rows import NeuronRows
        from ..pipeline.options import EngineOptions
        from ..pipeline.plan import Plan
        from ..pipeline.slab import Slab, SlabPlan
        from ..pipeline.step_times import StepTimes
        from ..pipeline.weights import COMPUTE_DTYPES
        from .yardstick import neuron_files

        native_library.choose()
        options, layout, config = EngineOptions(), SlabPlan(), store.config
        layers = config.num_layers
        plan = Plan(
            ffn=(way,) * layers, slots=(slots,) * layers, streamed_attention=(False,) * layers, streamed_head=False,
            predictor=None, prefetch=None, loaders=options.loaders, queue_depth=options.queue_depth, merge_gap=0,
        )  # fmt: skip
        regions = LoaderPool.reserve(layout, options.loaders, config.d_ff)
        self._room = NeuronRows(layout, store.bundles, _FETCHED)
        bias = [np.ones(config.d_ff, np.float32)] * layers
        self.neurons = LayeredFeedForward(store, layout, bias, COMPUTE_DTYPES["bfloat16"], options, plan)
        self.slab = Slab(layout.num_bytes, large=layout.large, contiguous=layout.contiguous)
        self.pool = LoaderPool(store, self.slab, regions, depth=options.queue_depth)
        self.neurons.bind(self.slab, self.pool)
        self.times, self._config, self.d_ff = StepTimes(), config, config.d_ff
        self.bundle_bytes = store.bundles.bundle_bytes
        self.files = neuron_files(store)
        self._other = np.ones(_SWEPT_BYTES // 8)
        if self.neurons.cached is not None:
            self.neurons.cached.observe(self.times)

    def tile(self, num_seqs: int, neuron_ids: np.ndarray | None = None) -> Any:
        """A step's inputs, each sequence with the given neurons predicted."""
        from ..pipeline.feed_forward import Tile
        from ..pipeline.weights import on_device

        x = on_device(np.full((num_seqs, self._config.d_model), 1e-3, np.float32))
        predicted = None
        if neuron_ids is not None:
            mask = np.zeros((num_seqs, self._config.d_ff), bool)
            mask[:, neuron_ids] = True
            predicted = on_device(mask)
        return Tile(residual=x, ffn_in=x, active=np.ones(num_seqs, bool), predicted=predicted)

    def timed_step(self, num_seqs: int, neuron_ids: np.ndarray) -> tuple[float, int]:
        """A step with these neurons predicted: seconds for placing them, and how many were missing."""
        tile = self.tile(num_seqs, neuron_ids)
        self._other.sum()  # in a run, a layer's weights have gone through the processor's caches before
        before = self.times.copy()
        self.neurons.add_step(0, tile).block_until_ready()
        return (self.times.memory_ns - before.memory_ns) / 1e9, self.times.misses - before.misses

    def fetch(self, neuron_ids: np.ndarray) -> float:
        """Seconds until loaders have read these neurons, asked for at once."""
        began = time.perf_counter()
        self.pool.wait(self.pool.scatter(0, neuron_ids, np.arange(len(neuron_ids)), self._room.offsets))
        return time.perf_counter() - began

    def processor_s(self) -> float:
        """Processor time that the loaders have had."""
        ticks = 0
        for process in self.pool.process_ids:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "_Layer":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        self.slab.close()


def streaming(store: Store, yardstick: Any, state: Any, batches: Sequence[int]) -> dict[str, Any]:
    """Layers streamed in blocks: the disk's rate, and what computing with a block takes meanwhile."""
    from ..pipeline.device import KernelTimes, Rate
    from ..pipeline.feed_forward import STREAM_BUFFERS
    from ..pipeline.plan import BLOCK_BYTES, STREAMED

    rates, kernels, processor = [], {}, 0.0
    layers = min(_MOST_STREAMED, max(1, _STREAMED_BYTES // store.bundles.layer_bytes))
    num_bytes, blocks = layers * store.bundles.layer_bytes, layers * -(-store.bundles.layer_bytes // BLOCK_BYTES)
    there = (STREAM_BUFFERS - 1) * min(store.bundles.layer_bytes, BLOCK_BYTES)  # before the time begins
    with _Layer(store, STREAMED, 0) as layer:
        # A run goes through all of them again and again, and a host may keep some: not as after the random reads before this.
        for number in range(min(store.config.num_layers, _WARMED_BYTES // store.bundles.layer_bytes)):
            layer.neurons.add_step(number, layer.tile(1)).block_until_ready()
        for batch in batches:
            tile = layer.tile(batch)
            layer.neurons.add_step(0, tile).block_until_ready()
            samples = []
            for turn in range(3):
                now = yardstick.measure()
                began, waited, used = time.perf_counter(), layer.pool.wait_ns, layer.processor_s()
                for number in range(layers):  # others than the last time, as far as there are
                    layer.neurons.add_step((turn * layers + number) % store.config.num_layers, tile).block_until_ready()
                elapsed, waited = time.perf_counter() - began, (layer.pool.wait_ns - waited) / 1e9
                share = state.kernel_s[batch] / now.kernel_s[batch]
                rate = max(num_bytes - there, num_bytes / 4) / elapsed * state.stream_bytes_per_s / now.stream_bytes_per_s
                samples.append((share * (elapsed - waited), rate, share * (layer.processor_s() - used)))
            compute, rate, used = (statistics.median(values) for values in zip(*samples, strict=True))
            rates.append(rate)
            processor = used if batch == 1 else processor
            # Loaders' share of the processors is what the cost model adds by itself.
            compute = max(compute - used / len(os.sched_getaffinity(0)), compute / 4)
            fixed = 5e-5
            kernels[batch] = KernelTimes.along(Rate(fixed_s=fixed, bytes_per_s=num_bytes / max(compute - blocks * fixed, 1e-9)))
    return {"stream_bytes_per_s": max(rates), "stream_cpu_s": processor / num_bytes, "block": kernels}


def fetching(store: Store, yardstick: Any, state: Any) -> dict[str, Any]:
    """What the cache's own work takes, and loaders' for one neuron."""
    from ..pipeline.plan import CACHED

    d_ff = store.config.d_ff
    rng = np.random.default_rng(0)
    slots = d_ff // 2
    hot = np.sort(rng.choice(d_ff, slots - max(_HITS), replace=False)).astype(np.int32)
    with _Layer(store, CACHED, slots) as layer:
        assert layer.neurons.cached is not None
        tile = layer.tile(1, hot)
        layer.neurons.cached.warm_up(tile)
        layer.neurons.add_step(0, tile).block_until_ready()  # large parts of the cache are filled
        placing = {count: [] for count in _HITS}
        now = yardstick.measure()
        for turn in range(_REPETITIONS):
            if turn % 5 == 4:
                now = yardstick.measure()
            for count in _HITS:
                memory, missing = layer.timed_step(1, np.sort(rng.choice(hot, count, replace=False)))
                if turn and not missing:
                    placing[count].append(memory * state.processor_s / now.processor_s)
        place = _line(_HITS, [statistics.median(placing[count]) for count in _HITS])
        single, processor = _missing(layer, rng, hot)
        processor *= state.processor_s / yardstick.measure().processor_s
        ask = _asking(layer, rng, hot, place, yardstick, state)
    return {"placing": place, "asking": ask, "request_s": single, "read_cpu_s": processor}


def _asking(layer: _Layer, rng: np.random.Generator, hot: np.ndarray, place: Any, yardstick: Any, state: Any) -> Any:
    """The engine's own time for asking loaders for neurons and giving out slots, beyond that of placing as many."""
    others = np.setdiff1d(np.arange(layer.d_ff, dtype=np.int32), hot)
    seconds = {count: [] for count in _HITS}
    now = yardstick.measure()
    for turn in range(_REPETITIONS):
        if turn % 5 == 4:
            now = yardstick.measure()
        for count in _HITS:
            memory, missing = layer.timed_step(1, np.sort(rng.choice(others, count, replace=False)))
            if missing > count / 2:
                seconds[count].append(memory * state.processor_s / now.processor_s - place.seconds(count))
    return _line(_HITS, [max(statistics.median(seconds[count]), 1e-5) for count in _HITS])


def _missing(layer: _Layer, rng: np.random.Generator, hot: np.ndarray) -> tuple[float, float]:
    """A single neuron's time beyond its read, and a loader's processor time for a read among many."""
    others, size = np.setdiff1d(np.arange(layer.d_ff, dtype=np.int32), hot), layer.bundle_bytes
    ((file, file_bytes),) = layer.files
    used, reads = layer.processor_s(), 0
    for _ in range(12):
        layer.fetch(np.sort(rng.choice(others, _FETCHED, replace=False)))
        reads += _FETCHED
    processor = (layer.processor_s() - used) / reads
    alone = statistics.median(layer.fetch(np.sort(rng.choice(others, 1))) for _ in range(48))
    return max(alone - size / read_rate(file, file_bytes, size, 1, _QUEUE_S), 2e-5), processor
