"""`inflash bench io`: the disk's curve, and what the loaders get of it.

Two things are measured on one file, in turn with fio where that is installed, and medians are compared, because disks are shared:

- The curve: random reads past the page cache, by size and by how many are under way. Larger reads and more of them are faster up to the
  disk's limit; how the time of a read grows with its size says how large a gap is worth reading across. The reads are our own queue's,
  with nothing around it, and fio's with the same engine.
- The loaders, asked for random neurons through shared memory as a decoding step asks. They do more for the same bytes: they take
  requests, plan reads, and report.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InflashError
from ..storage.layout import bundles_path
from ..storage.model_config import ModelConfig
from ..storage.read_rate import read_rate, worthwhile_gap
from ..storage.shard_index import open_raw_array
from ..storage.store import Store, StoreWriter, open_store
from .progress import progress_bar
from .table import table

SIZES = tuple(4096 << power for power in range(9))  # 4 KiB to 1 MiB
DEPTHS = (1, 4, 16, 64, 128)
ROUNDS = 5
_REQUEST_NEURONS = 256  # misses of a layer that are asked for together


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One place of the curve: bytes a second of our queue, and of fio (None: not installed)."""

    size: int
    depth: int
    bytes_per_s: float
    fio_bytes_per_s: float | None


def run(arguments: argparse.Namespace) -> int:
    if (arguments.target / "zarr.json").exists():
        return _measure(open_store(arguments.target), arguments)
    if not arguments.target.is_dir():
        raise InflashError(f"{arguments.target}: expected a store or a folder, found neither")
    with tempfile.TemporaryDirectory(prefix="inflash-bench-", dir=arguments.target) as folder:
        return _measure(scratch_store(Path(folder) / "store", arguments.bundle_bytes, arguments.file_mib), arguments)


def scratch_store(path: Path, bundle_bytes: int, file_mib: int) -> Store:
    """A store with one layer of random neurons and nothing else."""
    if bundle_bytes < 1024 or bundle_bytes % 1024:
        raise InflashError(f"--bundle-bytes: expected a multiple of 1024, found {bundle_bytes}")
    d_model, d_ff = bundle_bytes // 4, max(1, (file_mib << 20) // bundle_bytes)
    config = ModelConfig(
        family="bench", vocab_size=1, d_model=d_model, d_ff=d_ff, num_layers=1, num_heads=1, max_positions=1, embed_dim=d_model
    )
    writer = StoreWriter(path, config, "bfloat16", "random bytes")
    block = np.random.default_rng(0).integers(0, 2**16, (max(1, (8 << 20) // bundle_bytes), 2, d_model), np.uint16)
    writer.write_neurons(0, (block[: min(len(block), d_ff - start)] for start in range(0, d_ff, len(block))))
    writer.finish()
    return open_store(path)


def _measure(store: Store, arguments: argparse.Namespace) -> int:
    shard = open_raw_array(store.path / bundles_path(0))
    sizes = [size for size in SIZES if size <= min(store.bundles.layer_bytes, 1 << 20)]
    points: list[Point] = []
    with progress_bar(total=len(sizes) * len(DEPTHS) + ROUNDS, desc="reading", unit=" steps") as bar:
        for size in sizes:
            for depth in DEPTHS:
                ours = read_rate(shard.file, store.bundles.layer_bytes, size, depth, arguments.seconds / 6)
                fio = _fio(shard.file, store.bundles.layer_bytes, size, depth, arguments.seconds / 6)
                points.append(Point(size=size, depth=depth, bytes_per_s=ours, fio_bytes_per_s=fio))
                bar.update()
        rates = _loader_rates(store, shard.file, arguments, bar.update)
    _report(store, arguments, points, rates)
    return 0


def _loader_rates(store: Store, file: Path, arguments: argparse.Namespace, progress) -> dict[str, float | None]:
    """Medians: bytes a second of the loaders, of our queue alone and of fio, with reads of a bundle and the loaders' depth."""
    depth, size = arguments.loaders * arguments.queue_depth, store.bundles.bundle_bytes
    samples: dict[str, list[float]] = {"loaders": [], "queue": [], "fio": []}
    with _Loaders(store, arguments.loaders, arguments.queue_depth) as loaders:
        for _ in range(ROUNDS):
            samples["loaders"].append(loaders.measure(arguments.seconds / ROUNDS))
            samples["queue"].append(read_rate(file, store.bundles.layer_bytes, size, depth, arguments.seconds / ROUNDS))
            if (rate := _fio(file, store.bundles.layer_bytes, size, depth, arguments.seconds / ROUNDS)) is not None:
                samples["fio"].append(rate)
            progress()
    return {name: statistics.median(values) if values else None for name, values in samples.items()}


def _report(store: Store, arguments: argparse.Namespace, points: list[Point], rates: dict[str, float | None]) -> None:
    bundle = store.bundles.bundle_bytes
    fio = {(point.size, point.depth): point.fio_bytes_per_s for point in points}
    ours = {(point.size, point.depth): point.bytes_per_s for point in points}
    print(f"Random reads past the page cache, MB/s{' (fio)' if any(fio.values()) else ''}: {arguments.target}\n")
    rows = []
    for size in sorted({point.size for point in points}):
        cells = [f"{ours[size, depth] / 1e6:.0f}" for depth in DEPTHS]
        cells = [
            f"{cell} ({rate / 1e6:.0f})" if (rate := fio[size, depth]) else cell
            for cell, depth in zip(cells, DEPTHS, strict=True)
        ]
        rows.append([f"{size >> 10} KiB", *cells])
    print(table(["size", *(f"{depth} under way" for depth in DEPTHS)], rows), end="\n\n")
    best = max(rate for name, rate in rates.items() if name != "loaders" and rate is not None)
    names = {"loaders": "inflash loaders", "queue": "our queue alone", "fio": "fio libaio"}
    lines = [
        [names[name], f"{rate / 1e6:.0f}", f"{rate / bundle:.0f}", f"{100 * rate / best:.0f}%"]
        for name, rate in rates.items()
        if rate is not None
    ]
    print(f"Bundles of {bundle} bytes, {arguments.loaders} loaders with {arguments.queue_depth} reads each under way:\n")
    print(table(["method", "MB/s", "reads/s", "of the best reference"], lines), end="\n\n")
    gap = worthwhile_gap((point.size, point.bytes_per_s) for point in points)
    print(f"Reading across a gap pays up to about {gap >> 10} KiB here (--merge-gap).")
    loaders = rates["loaders"] or 0.0
    document: dict[str, Any] = {
        "bundle_bytes": bundle,
        "loaders": arguments.loaders,
        "queue_depth": arguments.queue_depth,
        "loader_bytes_per_s": loaders,
        "queue_bytes_per_s": rates["queue"],
        "fio_bytes_per_s": rates["fio"],
        "share": loaders / best,
        "merge_gap_bytes": gap,
        "curve": [
            {"size": p.size, "depth": p.depth, "bytes_per_s": p.bytes_per_s, "fio_bytes_per_s": p.fio_bytes_per_s} for p in points
        ],
    }
    print(json.dumps(document))


class _Loaders:
    """The product's own loaders on the first layer, asked for random neurons as a decoding step asks."""

    def __init__(self, store: Store, loaders: int, depth: int) -> None:
        from ..pipeline.loader_pool import LoaderPool
        from ..pipeline.slab import Slab, SlabPlan

        self._store, plan = store, SlabPlan()
        layout = store.bundles
        regions = LoaderPool.reserve(plan, loaders, 4 * _REQUEST_NEURONS)
        # Two requests are under way, so that the loaders need not wait for the next one.
        self._slots = [plan.reserve(_REQUEST_NEURONS * layout.bundle_bytes) for _ in range(2)]
        self._slab = Slab(plan.num_bytes)
        self._pool = LoaderPool(store, self._slab, regions, depth=depth)
        self._rng = np.random.default_rng(1)

    def measure(self, seconds: float) -> float:
        """Bytes a second."""
        count = min(_REQUEST_NEURONS, self._store.config.d_ff)
        slots = np.arange(count)
        self._pool.wait(self._ask(0, count, slots))  # the loader opens its files
        began, served = time.perf_counter(), 0
        tickets = [self._ask(0, count, slots), self._ask(1, count, slots)]
        turn = 0
        while time.perf_counter() - began < seconds:
            self._pool.wait(tickets[turn])
            served += count
            tickets[turn] = self._ask(turn, count, slots)
            turn = 1 - turn
        elapsed = time.perf_counter() - began
        for ticket in tickets:
            self._pool.wait(ticket)
        return served * self._store.bundles.bundle_bytes / elapsed

    def _ask(self, turn: int, count: int, slots: np.ndarray):
        positions = np.sort(self._rng.choice(self._store.config.d_ff, count, replace=False))
        return self._pool.scatter(0, positions, slots, self._slots[turn])

    def __enter__(self) -> "_Loaders":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
        self._slab.close()


def _fio(file: Path, file_bytes: int, size: int, depth: int, seconds: float) -> float | None:
    """What fio gets for the same reads with the same engine, bytes a second; None where it is not installed."""
    if not shutil.which("fio"):
        return None
    command = [
        "fio", "--name=read", f"--filename={file}", "--readonly", "--rw=randread", "--direct=1", "--ioengine=libaio",
        f"--bs={size}", f"--iodepth={depth}", "--thread", "--time_based", f"--runtime={max(1, round(seconds))}",
        "--output-format=json", "--randrepeat=0", "--norandommap", f"--filesize={file_bytes // size * size}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise InflashError(f"fio ended with {result.returncode}: {result.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(result.stdout)["jobs"][0]["read"]["bw_bytes"])
