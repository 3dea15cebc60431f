"""What a decoding step will take: a step of a plan gone through on paper, with the figures of a device.

Time goes on with what the engine does one after the other (attention, predictor, placing, neurons); beside it the disk serves what the
loaders were asked for. Where the engine has nothing left to compute it waits. So how much of the reading hides behind computing
comes out of the going-through, and is no figure of its own. Reference: arXiv:2312.11514, 2.3.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..storage.store import Store
from .device import GROUP_SIZE, Device
from .feed_forward import block_rows
from .hit_curves import HitCurves, LayerCurve
from .matrix_stream import MATRIX_BUFFERS
from .memory_parts import head_block_bytes
from .options import EngineOptions
from .paper_disk import PaperDisk, PaperStream
from .plan import CACHED, STREAMED, Plan, head_block_rows
from .predictors import predictor_memory_bytes
from .read_schedule import BYTES_BEFORE_NEURONS
from .weights import compute_dtype

_STEPS = 3  # gone through; the last one is steady


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Milliseconds of a step in the paper's parts, under the names of `StepTimes.summary`, and what is read for it."""

    io_wait_ms: float
    memory_ms: float
    compute_ms: float
    total_ms: float
    reads: float
    read_bytes: float

    def to_json(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name.endswith("_ms")}


class CostModel:
    """Predicts steps of one model on one device."""

    def __init__(self, store: Store, options: EngineOptions, device: Device, curves: HitCurves) -> None:
        self.store, self.device, self.curves = store, device.for_model(store.num_bytes), curves
        self._compute = compute_dtype(options.compute_dtype, store.dtype)
        self._predictor_bytes: dict[tuple[str, int], int] = {}

    def predict(self, plan: Plan, num_seqs: int, positions: int) -> StepCost:
        """A step of `num_seqs` sequences that look back on `positions` each, after the caches have filled."""
        cost = self.predict_below(plan, num_seqs, positions, math.inf)
        assert cost is not None
        return cost

    def predict_below(self, plan: Plan, num_seqs: int, positions: int, most_ms: float) -> StepCost | None:
        """Likewise; None as soon as it is clear that a step takes longer than `most_ms`."""
        layers = self.curves.of(num_seqs)
        slowdown, hidden = 1.0, 0.0
        cost, busy_s, processor_s = self._walk(plan, layers, num_seqs, positions, slowdown, hidden)
        if cost.total_ms > most_ms:  # and what follows only makes it slower
            return None
        for _ in range(2):  # loaders and kernels share the processors while both have work
            hidden = 1 - min(1.0, cost.io_wait_ms / 1e3 / busy_s) if busy_s else 0.0
            slowdown = 1 + hidden * processor_s / self.device.cores / max(cost.compute_ms / 1e3 / slowdown, 1e-9)
            cost, busy_s, processor_s = self._walk(plan, layers, num_seqs, positions, slowdown, hidden)
        return cost

    def _walk(
        self, plan: Plan, layers: Sequence[LayerCurve], num_seqs: int, positions: int, slowdown: float, hidden: float
    ) -> tuple[StepCost, float, float]:
        """A step, the time that the disk was busy for it, and the loaders' processor time."""
        walk = _Walk(self, plan, layers, num_seqs, positions, slowdown, hidden)
        before = walk.totals()
        for _ in range(_STEPS):
            before = walk.totals()
            walk.step()
        now, wait, memory, compute, busy, processor, reads, num_bytes = (
            new - old for new, old in zip(walk.totals(), before, strict=True)
        )
        cost = StepCost(
            io_wait_ms=1e3 * wait,
            memory_ms=1e3 * memory,
            compute_ms=1e3 * compute,
            total_ms=1e3 * now,
            reads=reads,
            read_bytes=num_bytes,
        )
        return cost, busy, processor

    def predictor_layer_bytes(self, name: str, layer: int) -> int:
        if (name, layer) not in self._predictor_bytes:
            self._predictor_bytes[name, layer] = predictor_memory_bytes(self.store, name, self._compute, [layer])
        return self._predictor_bytes[name, layer]

    @property
    def item_bytes(self) -> int:
        """Of a weight in memory."""
        return self._compute.itemsize


class _Walk:
    """The state of going through steps."""

    def __init__(
        self,
        model: CostModel,
        plan: Plan,
        layers: Sequence[LayerCurve],
        num_seqs: int,
        positions: int,
        slowdown: float,
        hidden: float,
    ) -> None:
        """`hidden`: the share of reading that happens beside kernels."""
        self._model, self._plan, self._curves, self._num_seqs = model, plan, layers, num_seqs
        self._device, self._slowdown = model.device, slowdown
        config, bundles = model.store.config, model.store.bundles
        self._kernels: dict[tuple[str, float], float] = {}
        self._bundle_bytes, self._d_ff, self._num_layers = bundles.bundle_bytes, config.d_ff, config.num_layers
        seqs = min(num_seqs, max(self._device.kernels["keys and values"]))  # for more, what these take is multiplied
        self._attention_s = self._kernel("attention", 4 * config.d_model**2 * model.item_bytes)
        self._attention_s += self._kernel("keys and values", seqs * positions * 8 * config.d_model)
        self._item_s = slowdown * self._device.matrix_s(num_seqs)
        self._between_s, self._delayed_s = self._device.between_s(num_seqs), self._device.delay_s(num_seqs)
        self._head_s = self._kernel("head", config.vocab_size * config.embed_dim * model.item_bytes)
        self._rows = block_rows(model.store, plan.block_bytes)
        self.now = self.wait = self.memory = self.compute = self.processor = self.reads = self.num_bytes = 0.0
        self._arriving: dict[int, float] = {}
        self._disk = PaperDisk(plan.loaders * BYTES_BEFORE_NEURONS / self._device.stream_bytes_per_s)
        square, block = bundles.row_bytes * config.d_model, head_block_bytes(model.store)
        head_bytes = block // head_block_rows(config) * config.vocab_size
        self._head_bytes = [min(block, head_bytes - start) for start in range(0, head_bytes, block)] if plan.streamed_head else []
        qkv, out = [3 * square] * sum(plan.streamed_qkv), [square] * sum(plan.streamed_out)
        # To where they are used, so as fast as the disk is, but for the processors that kernels keep from it.
        beside, alone = self._device.stream_bytes_per_s, self._device.state.stream_bytes_per_s
        rate = 1 / (hidden / min(beside, alone) + (1 - hidden) / alone)
        self._qkv, self._out = (self._stream(sizes, MATRIX_BUFFERS, rate) for sizes in (qkv, out + self._head_bytes))
        self._square_bytes = square
        streamed = len(plan.layers(STREAMED))
        self._block_bytes = [
            min(self._rows, self._d_ff - first) * self._bundle_bytes for first in range(0, self._d_ff, self._rows)
        ]
        self._blocks = self._stream(self._block_bytes * streamed, plan.block_buffers, self._device.stream_bytes_per_s)

    def _stream(self, sizes: Sequence[int], num_buffers: int, bytes_per_s: float) -> PaperStream | None:
        if not sizes:
            return None
        return PaperStream(self._disk, [self._device.request_s / 4 + size / bytes_per_s for size in sizes], num_buffers)

    def totals(self) -> tuple[float, ...]:
        return (
            self.now, self.wait, self.memory, self.compute, self._disk.busy_s, self.processor, self.reads, self.num_bytes,
        )  # fmt: skip

    def _kernel(self, name: str, num_bytes: float) -> float:
        if (name, num_bytes) not in self._kernels:  # the same few, for thousands of plans
            self._kernels[name, num_bytes] = self._slowdown * self._device.kernel_s(name, self._num_seqs, num_bytes)
        return self._kernels[name, num_bytes]

    def _compute(self, seconds: float) -> None:
        self.now += seconds
        self.compute += seconds

    def _wait_until(self, then: float) -> None:
        if then > self.now:
            self.wait += then - self.now
            self.now = then

    def step(self) -> None:
        for layer in range(self._num_layers):
            self._attend(layer)
            self._predict(layer)
            if self._plan.ffn[layer] == CACHED:
                self._add_cached(layer)
            else:
                self._guess(layer + 1)
                self._add_all(layer)
        if self._out is None or not self._head_bytes:
            self._compute(self._head_s)
            return
        for size in self._head_bytes:
            self._take([(self._out, size)], self._item_s + self._head_s * size / sum(self._head_bytes))

    def _take(self, items: Sequence[tuple[PaperStream, int]], seconds: float) -> None:
        """Items of streams and their bytes, computed with for so long."""
        for stream, _ in items:
            self._wait_until(stream.take(self.now))
        self._compute(seconds)
        for stream, size in items:
            stream.ask(self.now)
            self._count(size / (1 << 20), size, size * self._device.stream_cpu_s)

    def _count(self, reads: float, num_bytes: float, processor_s: float) -> None:
        self.reads += reads
        self.num_bytes += num_bytes
        self.processor += processor_s

    def _attend(self, layer: int) -> None:
        items = []
        if self._plan.streamed_qkv[layer] and self._qkv is not None:
            items.append((self._qkv, 3 * self._square_bytes))
        if self._plan.streamed_out[layer] and self._out is not None:
            items.append((self._out, self._square_bytes))
        self._take(items, self._attention_s + (self._item_s if items else 0.0))

    def _predict(self, layer: int) -> None:
        """Both predictors are one call where both are needed."""
        names = [(self._plan.predictor, layer)] if self._plan.ffn[layer] == CACHED else []
        if self._plan.prefetch and layer + 1 < self._num_layers and self._plan.ffn[layer + 1] == CACHED:
            names.append((self._plan.prefetch, layer + 1))
        sizes = [self._model.predictor_layer_bytes(name, at) for name, at in names if name]
        if sizes:
            self._compute(self._kernel(("predictor", "two predictors")[len(sizes) - 1], sum(sizes)))

    def _ask(self, neurons: float) -> float:
        device = self._device
        self._count(neurons, neurons * self._bundle_bytes, neurons * device.read_cpu_s)
        depth, loaders = self._plan.queue_depth * self._plan.loaders, self._plan.loaders
        begun = self.now + min(neurons, 1.0) * self._delayed_s  # what streams by goes on until then
        return self._disk.ask_neurons(begun, device.read_s(neurons, self._bundle_bytes, depth, loaders))

    def _place(self, neurons: float, missing: float) -> None:
        """Fewer than one missing neuron a step is a request in so many steps."""
        device = self._device
        asking = min(missing, 1.0) * device.asking.seconds(max(missing, 1.0))
        seconds = self._slowdown * (device.placing.seconds(neurons) + asking)
        self.now += seconds
        self.memory += seconds

    def _guess(self, layer: int) -> None:
        if self._plan.prefetch and layer < self._num_layers and self._plan.ffn[layer] == CACHED:
            curve = self._curves[layer]
            missing = curve.at("ahead", self._plan.slots[layer])
            self._place(curve.guessed, missing)
            self._arriving[layer] = self._ask(missing)

    def _add_cached(self, layer: int) -> None:
        curve, slots = self._curves[layer], self._plan.slots[layer]
        self._compute(self._between_s)
        guessed = self._arriving.pop(layer, None)
        missing = curve.at("misses" if guessed is None else "late", slots)
        self._place(curve.named, missing)
        there = self._ask(missing)
        self._guess(layer + 1)
        late = missing
        if guessed is not None and guessed > self.now:
            late += curve.at("ahead", slots)
            there = max(there, guessed)
        self._gather(layer, curve.named - late)
        if late > 0:
            self._wait_until(there) if late >= 1 else self._wait_until(self.now + late * max(there - self.now, 0))
            self._gather(layer, late)

    def _gather(self, layer: int, neurons: float) -> None:
        """Fewer than one neuron a step are a call in so many steps."""
        if neurons > 0:
            share = self._model.curves.of(GROUP_SIZE)[layer].named / max(self._curves[layer].named, 1)
            kernel = self._device.gather_s(self._num_seqs, max(neurons, 1) * self._bundle_bytes, min(share, 1.0))
            self._compute(min(neurons, 1.0) * self._slowdown * kernel)

    def _add_all(self, layer: int) -> None:
        layer_bytes = self._d_ff * self._bundle_bytes
        dense = self._kernel("dense", layer_bytes)
        if self._plan.ffn[layer] == STREAMED and self._blocks is not None:
            for size in self._block_bytes:  # the same arithmetic, so never less; what hides behind reading is hard to measure
                self._take([(self._blocks, size)], max(self._kernel("block", size), dense * size / layer_bytes))
        else:
            self._compute(dense)
