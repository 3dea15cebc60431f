"""How layers stream through the engine's own parts, and how loaders fetch single neurons."""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.read_rate import read_rate
from ..storage.store import Store
from .stopwatch import seconds_of

_STREAMED_BYTES, _MOST_STREAMED, _WARMED_BYTES = 256 << 20, 64, 2 << 30
_FETCHED, _FETCHES = 1024, 12  # neurons that loaders are asked for at once, and how often
_PASSING, _PASSING_BYTES, _PASSING_S, _PRODUCTS = 4, 8 << 20, 0.25, 6  # what streams beside a product, for how long
_PASSINGS = 3
_QUEUE_S = 0.1  # that the read queue alone is looked at, beside loaders


class _Layer:
    """The engine's stream of neurons, on a store's layers, with loaders."""

    def __init__(self, store: Store) -> None:
        from ..pipeline import native_library
        from ..pipeline.layered_feed_forward import LayeredFeedForward
        from ..pipeline.loader_pool import LoaderPool
        from ..pipeline.options import EngineOptions
        from ..pipeline.plan import STREAMED, Plan
        from ..pipeline.slab import Slab, SlabPlan
        from ..pipeline.weights import COMPUTE_DTYPES
        from .yardstick import neuron_files

        native_library.choose()
        options, layout, config = EngineOptions(), SlabPlan(), store.config
        layers = config.num_layers
        plan = Plan(
            ffn=(STREAMED,) * layers, slots=(0,) * layers, streamed_qkv=(False,) * layers, streamed_out=(False,) * layers,
            streamed_head=False, predictor=None, prefetch=None, loaders=options.loaders, queue_depth=options.queue_depth, merge_gap=0,
        )  # fmt: skip
        regions = LoaderPool.reserve(layout, options.loaders, config.d_ff)
        self._room = layout.reserve(_FETCHED * store.bundles.bundle_bytes)
        self._file_bytes, self._passing_at = store.bundles.layer_bytes, self._reserve(layout)
        bias = [np.ones(config.d_ff, np.float32)] * layers
        self.neurons = LayeredFeedForward(store, layout, bias, COMPUTE_DTYPES["bfloat16"], options, plan)
        self.slab = Slab(layout.num_bytes, large=layout.large, contiguous=layout.contiguous)
        files = [file for file, _ in neuron_files(store)[:1]]
        self.pool = LoaderPool(store, self.slab, regions, depth=options.queue_depth, files=files)
        self.neurons.bind(self.slab, self.pool)
        self._config = config

    def tile(self, num_seqs: int) -> Any:
        """A step's inputs."""
        from ..pipeline.feed_forward import Tile
        from ..pipeline.weights import on_device

        x = on_device(np.full((num_seqs, self._config.d_model), 1e-3, np.float32))
        return Tile(residual=x, ffn_in=x, active=np.ones(num_seqs, bool))

    def fetch(self, neuron_ids: np.ndarray) -> float:
        """Seconds until loaders have read these neurons, asked for at once."""
        began = time.perf_counter()
        self.pool.wait(self.pool.scatter(0, neuron_ids, np.arange(len(neuron_ids)), self._room))
        return time.perf_counter() - began

    @staticmethod
    def _reserve(layout: Any) -> list[int]:
        with layout.in_one_piece():
            return [layout.reserve(_PASSING_BYTES) for _ in range(_PASSING)]

    def taken_from_kernels(self, product: Callable[[], object]) -> float:
        """Processor time that kernels lose for each byte that streams by meanwhile, by how much slower a product becomes.

        More than what a loader uses: a virtual disk's host, and the memory, work for a read, too.
        """
        size = min(_PASSING_BYTES, self._file_bytes)
        alone = statistics.median(seconds_of(product) for _ in range(_PRODUCTS))
        tickets, asked, arrived, products = deque[Any](), 0, 0, 0
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < _PASSING_S:
            while len(tickets) < _PASSING:
                offset = asked * size % max(self._file_bytes - size + 1, 1) // size * size
                tickets.append(self.pool.read_bytes(0, offset, size, self._passing_at[asked % _PASSING]))
                asked += 1
            product()
            products += 1
            while tickets and self.pool.finished(tickets[0]):
                tickets.popleft()
                arrived += 1
        for ticket in tickets:
            self.pool.wait(ticket)
        lost = max(elapsed - products * alone, 0.0) * len(os.sched_getaffinity(0))
        return lost / max(arrived * size, 1)

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
    from ..pipeline.plan import BLOCK_BUFFERS, BLOCK_BYTES

    rates, kernels = [], {}
    layers = min(_MOST_STREAMED, max(1, _STREAMED_BYTES // store.bundles.layer_bytes))
    num_bytes, blocks = layers * store.bundles.layer_bytes, layers * -(-store.bundles.layer_bytes // BLOCK_BYTES)
    there = (BLOCK_BUFFERS - 1) * min(store.bundles.layer_bytes, BLOCK_BYTES)  # before the time begins
    with _Layer(store) as layer:
        taken = statistics.median(layer.taken_from_kernels(yardstick.product(min(batches))) for _ in range(_PASSINGS))
        # A run goes through all of them again and again, and a host may keep some: not as after the random reads before this.
        for number in range(min(store.config.num_layers, _WARMED_BYTES // store.bundles.layer_bytes)):
            layer.neurons.add_step(number, layer.tile(1)).block_until_ready()
        for batch in batches:
            tile = layer.tile(batch)
            layer.neurons.add_step(0, tile).block_until_ready()
            samples = []
            for turn in range(3):
                now = yardstick.measure("kernel_s", "stream_bytes_per_s")
                began, waited = time.perf_counter(), layer.pool.wait_ns
                for number in range(layers):  # others than the last time, as far as there are
                    layer.neurons.add_step((turn * layers + number) % store.config.num_layers, tile).block_until_ready()
                elapsed, waited = time.perf_counter() - began, (layer.pool.wait_ns - waited) / 1e9
                share = state.kernel_s[batch] / now.kernel_s[batch]
                rate = max(num_bytes - there, num_bytes / 4) / elapsed * state.stream_bytes_per_s / now.stream_bytes_per_s
                samples.append((share * (elapsed - waited), rate))
            compute, rate = (statistics.median(values) for values in zip(*samples, strict=True))
            rates.append(rate)
            # What streaming takes from kernels is what the cost model adds by itself.
            compute = max(compute - taken * num_bytes / len(os.sched_getaffinity(0)), compute / 4)
            fixed = 5e-5
            kernels[batch] = KernelTimes.along(Rate(fixed_s=fixed, bytes_per_s=num_bytes / max(compute - blocks * fixed, 1e-9)))
    return {"stream_bytes_per_s": max(rates), "stream_cpu_s": taken, "block": kernels}


def fetching(store: Store, yardstick: Any, state: Any) -> dict[str, float]:
    """A single neuron's time beyond its read, and a loader's processor time for a read among many."""
    from .yardstick import neuron_files

    rng, d_ff, size = np.random.default_rng(0), store.config.d_ff, store.bundles.bundle_bytes
    with _Layer(store) as layer:

        def fetch_many() -> None:
            layer.fetch(np.sort(rng.choice(d_ff, _FETCHED, replace=False)))

        fetch_many()  # until it answers, a loader is starting, which takes half a second of its processor
        used = layer.processor_s()
        for _ in range(_FETCHES):
            fetch_many()
        processor = (layer.processor_s() - used) / (_FETCHES * _FETCHED)
        alone = statistics.median(layer.fetch(rng.choice(d_ff, 1)) for _ in range(48))
        pace = state.processor_s / yardstick.measure("processor_s").processor_s
    ((file, file_bytes),) = neuron_files(store)
    single = alone - size / read_rate(file, file_bytes, size, 1, _QUEUE_S)
    return {"request_s": pace * max(single, 2e-5), "read_cpu_s": pace * processor}
