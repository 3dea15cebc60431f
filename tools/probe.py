"""`inflash probe`: what this machine and a disk can do, for the cost model.

The disk's curve is measured with our read queue alone. Everything else is measured with the engine's own parts, on a layer of random
neurons that is written to the disk and removed: blocks that are streamed and computed with, neurons that a cache misses and loaders fetch,
and the attention, head and predictor kernels at several widths. A line through what calls of several sizes take gives what a call costs
and what a byte does.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InflashError
from ..storage.read_rate import read_rate
from ..storage.store import Store, open_store
from .progress import progress_bar
from .table import table

SIZES = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 128 << 10, 1 << 20)
DEPTHS = (1, 16, 128)
BATCHES = (1, 8)
WIDTHS = (256, 1024, 2048, 4096)
"""d_model of the kernels; d_ff is four times as much."""
_TOLD = (1 << 20, 8 << 20, 64 << 20)
_BUNDLE_BYTES, _FILE_MIB = 8 << 10, 384
_CURVE_S, _KERNEL_S = 0.4, 0.25
_HITS = (64, 512, 2048)  # predicted neurons of a step
_REPETITIONS = 16
_SWEPT_BYTES = 48 << 20
_STREAMED_BYTES, _MOST_STREAMED, _WARMED_BYTES = 256 << 20, 64, 2 << 30
_FETCHED = 1024  # neurons that loaders are asked for at once


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.device import device_path

    folder: Path = arguments.folder
    if not folder.is_dir():
        raise InflashError(f"{folder}: expected a folder on the disk to measure")
    disk = folder.parent if (folder / "zarr.json").exists() else folder
    with tempfile.TemporaryDirectory(prefix=".inflash-probe-", dir=disk) as scratch:
        device = measure(Path(scratch), folder)
    document = device.to_json()
    file = arguments.output or device_path(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InflashError(f"{file}: cannot be written: {error.strerror}") from error
    if arguments.json:
        print(json.dumps(document))
    else:
        _report(device, file)
    return 0


def measure(scratch: Path, folder: Path) -> Any:
    """A `Device` for the disk of `folder`, measured with a file in `scratch` on the same disk."""
    from ..pipeline.device import Device, MachineState, machine_of
    from .bench_io import scratch_store
    from .yardstick import Yardstick, neuron_files

    steps = len(SIZES) * len(DEPTHS) + 6
    with progress_bar(total=steps, desc="measuring", unit=" steps") as bar:
        machine = machine_of(folder)
        own = scratch_store(scratch / "store", _BUNDLE_BYTES, _FILE_MIB)
        store = open_store(folder) if (folder / "zarr.json").exists() else own
        files = neuron_files(store)
        yardstick = Yardstick(files, BATCHES)
        bar.update()
        measured, pace = _kernels(yardstick)
        bar.update()
        states = [yardstick.measure() for _ in range(3)]
        curve = []
        for size in SIZES:
            rates = []
            for number, depth in enumerate(DEPTHS):
                file, file_bytes = files[(len(curve) + number) % len(files)]
                rates.append((depth, read_rate(file, file_bytes, min(size, file_bytes), depth, _CURVE_S)))
                bar.update()
            states.append(yardstick.measure())
            curve += [(size, depth, rate, MachineState.between(states[-2:])) for depth, rate in rates]
        state = replace(MachineState.between(states), kernel_s=pace)
        points = _curve_in(state, curve)
        streaming = _streaming(store, yardstick, state)
        bar.update()
        fetching = _fetching(own, yardstick, state)
        bar.update()
        kernels = measured | {"gather": fetching.pop("gather"), "block": streaming.pop("block")}
        dram = _dram()
        bar.update()
    return Device(
        state=state,
        machine=machine,
        cores=len(os.sched_getaffinity(0)),
        read_curve=points,
        dram_bytes_per_s=dram,
        kernels=kernels,
        **streaming,
        **fetching,
    )


def _curve_in(state: Any, curve: Sequence[tuple[int, int, float, Any]]) -> tuple[Any, ...]:
    """What was measured in many states, (size, depth, rate, state), as it would be in one: points of a `Device`."""
    from ..pipeline.device import ReadPoint

    return tuple(
        ReadPoint(size=size, depth=depth, bytes_per_s=rate * state.random_bytes_per_s / then.random_bytes_per_s)
        for size, depth, rate, then in curve
    )


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

    def timed_step(self, num_seqs: int, neuron_ids: np.ndarray) -> tuple[float, float, int]:
        """A step with these neurons predicted: its seconds, those of them for placing, and how many neurons were missing."""
        tile = self.tile(num_seqs, neuron_ids)
        self._other.sum()  # in a run, a layer's weights have gone through the processor's caches before
        before, began = self.times.copy(), time.perf_counter()
        self.neurons.add_step(0, tile).block_until_ready()
        elapsed = time.perf_counter() - began
        return elapsed, (self.times.memory_ns - before.memory_ns) / 1e9, self.times.misses - before.misses

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


def _streaming(store: Store, yardstick: Any, state: Any) -> dict[str, Any]:
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
        for batch in BATCHES:
            tile = layer.tile(batch)
            layer.neurons.add_step(0, tile).block_until_ready()
            samples = []
            for turn in range(4):
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


def _fetching(store: Store, yardstick: Any, state: Any) -> dict[str, Any]:
    """Steps of predicted neurons through a cache: all there, then all missing."""
    from ..pipeline.device import KernelTimes, Rate
    from ..pipeline.plan import CACHED

    d_ff, size = store.config.d_ff, store.bundles.bundle_bytes
    rng = np.random.default_rng(0)
    slots = d_ff // 2
    hot = np.sort(rng.choice(d_ff, slots - max(_HITS), replace=False)).astype(np.int32)
    gathers: dict[int, Any] = {}
    with _Layer(store, CACHED, slots) as layer:
        assert layer.neurons.cached is not None
        tile = layer.tile(1, hot)
        layer.neurons.cached.warm_up(tile)
        layer.neurons.add_step(0, tile).block_until_ready()  # large parts of the cache are filled
        placing = {count: [] for count in _HITS}
        for batch in BATCHES:
            seconds = {count: [] for count in _HITS}
            layer.neurons.cached.warm_up(layer.tile(batch, hot[:1]))
            now = yardstick.measure()
            for turn in range(_REPETITIONS):
                if turn % 6 == 5:
                    now = yardstick.measure()
                for count in _HITS:
                    elapsed, memory, missing = layer.timed_step(batch, np.sort(rng.choice(hot, count, replace=False)))
                    if turn and not missing:
                        seconds[count].append((elapsed - memory) * state.kernel_s[batch] / now.kernel_s[batch])
                        placing[count].append(memory * state.processor_s / now.processor_s)
            # A line: what is split into two calls, at whatever place, costs one call more.
            medians = [statistics.median(seconds[count]) for count in _HITS]
            gathers[batch] = KernelTimes.along(_line([count * size for count in _HITS], medians))
        place = _line(_HITS, [statistics.median(placing[count]) for count in _HITS])
        shares, single, processor = _missing(layer, rng, hot)
        processor *= state.processor_s / yardstick.measure().processor_s
        ask = _asking(layer, rng, hot, place, yardstick, state)
    return {
        "gather": gathers,
        "placing": Rate(fixed_s=place.fixed_s, bytes_per_s=place.bytes_per_s),
        "asking": ask,
        "request_s": single,
        "loader_share": shares,
        "read_cpu_s": processor,
    }


def _asking(layer: _Layer, rng: np.random.Generator, hot: np.ndarray, place: Any, yardstick: Any, state: Any) -> Any:
    """The engine's own time for asking loaders for neurons and giving out slots, beyond that of placing as many."""
    others = np.setdiff1d(np.arange(layer.d_ff, dtype=np.int32), hot)
    seconds = {count: [] for count in _HITS}
    now = yardstick.measure()
    for turn in range(_REPETITIONS):
        if turn % 8 == 7:
            now = yardstick.measure()
        for count in _HITS:
            _, memory, missing = layer.timed_step(1, np.sort(rng.choice(others, count, replace=False)))
            if missing > count / 2:
                seconds[count].append(memory * state.processor_s / now.processor_s - place.seconds(count))
    return _line(_HITS, [max(statistics.median(seconds[count]), 1e-5) for count in _HITS])


def _missing(layer: _Layer, rng: np.random.Generator, hot: np.ndarray) -> tuple[float, float, float]:
    """The share of the queue's rate that loaders reach, a single neuron's time beyond its read, and processor time a read.

    A loader that has no time for more reads is as fast as that allows; the share is of the slower of both.
    """
    others, size = np.setdiff1d(np.arange(layer.d_ff, dtype=np.int32), hot), _BUNDLE_BYTES
    ((file, file_bytes),) = layer.files
    used, reads, waits, rates = layer.processor_s(), 0, [], []
    for turn in range(12):
        some = np.sort(rng.choice(others, _FETCHED, replace=False))
        waits.append(layer.fetch(some))
        reads += len(some)
        if turn % 4 == 3:
            rates.append(read_rate(file, file_bytes, size, DEPTHS[-1], _CURVE_S / 4))
    processor = (layer.processor_s() - used) / reads
    possible = min(statistics.median(rates), size / max(processor, 1e-9))
    share = _FETCHED * size / statistics.median(waits) / possible
    alone = statistics.median(layer.fetch(np.sort(rng.choice(others, 1))) for _ in range(48))
    single = max(alone - size / read_rate(file, file_bytes, size, 1, _CURVE_S / 4), 2e-5)
    return min(share, 1.0), single, processor


def _kernels(yardstick: Any) -> tuple[dict[str, Any], Any]:
    """What the kernels of resident weights take at several widths, and the yardstick's products beside which they took so long.

    The smallest are measured among themselves: a model of that width stays in the processor's caches, too.
    """
    from ..pipeline.device import KernelTimes
    from .bench_kernels import kernel_seconds

    names = {"attention": "attention", "head": "head", "predictor": "predictor", "two predictors": "predictor and look-ahead"}
    names |= {"dense": "dense_ffn"}
    one: dict[int, float] = dict.fromkeys(BATCHES, 1.0)  # looking at the pace would push the small ones out of the caches
    small, _ = kernel_seconds(WIDTHS[:1], BATCHES, tuple(names.values()), _KERNEL_S, lambda: one)
    large, pace = kernel_seconds(WIDTHS[1:], BATCHES, tuple(names.values()), _KERNEL_S, yardstick.kernels)
    found: dict[str, dict[int, Any]] = {name: {} for name in names}
    for name, kernel in names.items():
        for batch in BATCHES:
            points = [
                measured[kernel, width, batch]
                for measured in (small, large)
                for width in WIDTHS
                if (kernel, width, batch) in measured
            ]
            found[name][batch] = KernelTimes.of(points)
    return found, pace


def _dram() -> dict[int, float]:
    """Bytes a second that so many threads read together from an array larger than any cache."""
    array = np.ones(48 << 20, np.uint64)
    rates = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        parts = np.array_split(array, threads)
        often = max(_together([lambda part=part: np.bitwise_or.reduce(part) for part in parts]) for _ in range(3))
        rates[threads] = array.nbytes * often
    return rates


def _together(calls: Sequence[Callable[[], object]]) -> float:
    """How often a second all the calls are made, in a thread each."""
    threads = [threading.Thread(target=call) for call in calls]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1 / (time.perf_counter() - began)


def _report(device: Any, file: Path) -> None:
    rates = {(point.size, point.depth): point.bytes_per_s for point in device.read_curve}
    print("Random reads past the page cache, MB/s:\n")
    rows = [[f"{size >> 10} KiB", *(f"{rates[size, depth] / 1e6:.0f}" for depth in DEPTHS)] for size in SIZES]
    print(table(["size", *(f"{depth} under way" for depth in DEPTHS)], rows), end="\n\n")
    print(
        f"Streaming through a loader: {device.stream_bytes_per_s / 1e9:.2f} GB/s. Loaders reach {device.loader_share:.0%} of the disk's"
    )
    print(f"rate of random reads and use {1e6 * device.read_cpu_s:.0f} us of processor time for each.\n")
    lines = [
        [name, batch, *(f"{1e6 * each.seconds(size):.0f}" for size in _TOLD), f"{_TOLD[-1] / each.seconds(_TOLD[-1]) / 1e9:.1f}"]
        for name, batches in device.kernels.items()
        for batch, each in batches.items()
    ]
    print("Kernels, us of a call that reads so much, and GB/s of the largest:\n")
    print(table(["kernel", "batch", *(f"{size >> 20} MiB" for size in _TOLD), "GB/s"], lines), end="\n\n")
    memory = ", ".join(f"{rate / 1e9:.1f} GB/s with {threads} threads" for threads, rate in device.dram_bytes_per_s.items())
    print(f"Memory reads {memory}. Placing neurons takes {1e6 * device.placing.fixed_s:.0f} us and")
    print(f"{1e9 / device.placing.bytes_per_s:.0f} ns for each, asking loaders {1e6 * device.asking.fixed_s:.0f} us")
    print(f"and {1e9 / device.asking.bytes_per_s:.0f} ns.\n\nkept in {file}")
