"""`inflash bench io`: what the loaders get from the disk, beside what the disk gives.

A bundle costs one read of a few KiB, so the figure that decides is random reads a second, not megabytes in order. The reference is a
plain loop: as many threads as the loaders have altogether, each calling `preadv` with O_DIRECT into one aligned buffer and doing nothing
else; and fio with the same size and depth, where it is installed. The loaders do more for the same bytes: they take requests from shared
memory, scatter each bundle into two rows, and report.

Each is measured in turn, several times, in one process tree on one file; medians are compared, because the disk is shared.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import InflashError
from ..storage.layout import bundles_path
from ..storage.model_config import ModelConfig
from ..storage.shard_index import open_raw_array
from ..storage.store import Store, StoreWriter, open_store
from .table import table

ROUNDS = 5
_REQUEST_NEURONS = 256  # misses of a layer that are asked for together


def run(arguments: argparse.Namespace) -> int:
    if (arguments.target / "zarr.json").exists():
        return _measure(open_store(arguments.target), arguments)
    if not arguments.target.is_dir():
        raise InflashError(f"{arguments.target}: expected a store or a folder, found neither")
    with tempfile.TemporaryDirectory(prefix="inflash-bench-", dir=arguments.target) as folder:
        return _measure(_scratch_store(Path(folder) / "store", arguments.bundle_bytes, arguments.file_mib), arguments)


def _scratch_store(path: Path, bundle_bytes: int, file_mib: int) -> Store:
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
    threads = arguments.loaders * arguments.queue_depth
    shard = open_raw_array(store.path / bundles_path(0))
    seconds = arguments.seconds / ROUNDS
    methods: dict[str, Callable[[float], float]] = {
        "preadv loop": lambda s: _plain_loop(shard.file, shard.row_offsets, shard.row_bytes, threads, s)
    }
    if shutil.which("fio"):
        methods["fio psync"] = lambda s: _fio(shard.file, shard.row_bytes, threads, s)
    with _Loaders(store, arguments.loaders, arguments.queue_depth) as loaders:
        methods["inflash loaders"] = loaders.measure
        samples: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(ROUNDS):
            for name, method in methods.items():
                samples[name].append(method(seconds))
    rates = {name: statistics.median(values) for name, values in samples.items()}
    best = max(rates["preadv loop"], rates.get("fio psync", 0.0))
    ours = rates["inflash loaders"]
    rows = [
        [name, f"{rate / 1e6:.0f}", f"{rate / shard.row_bytes:.0f}", f"{100 * rate / best:.0f}%"] for name, rate in rates.items()
    ]
    print(
        f"random reads of {shard.row_bytes} bytes, {arguments.loaders} loaders x {arguments.queue_depth} threads: {arguments.target}"
    )
    print(table(["method", "MB/s", "reads/s", "of the best reference"], rows))
    document = {
        "bundle_bytes": shard.row_bytes,
        "loaders": arguments.loaders,
        "queue_depth": arguments.queue_depth,
        "preadv_bytes_per_s": rates["preadv loop"],
        "fio_bytes_per_s": rates.get("fio psync"),
        "loader_bytes_per_s": ours,
        "share": ours / best,
    }
    print(json.dumps(document))
    return 0


class _Loaders:
    """The product's own loaders on the first layer, asked for random neurons as a decoding step asks."""

    def __init__(self, store: Store, loaders: int, threads: int) -> None:
        from ..pipeline.loader_pool import LoaderPool
        from ..pipeline.slab import Slab, SlabPlan

        self._store, plan = store, SlabPlan()
        layout = store.bundles
        regions = LoaderPool.reserve(plan, loaders, 4 * _REQUEST_NEURONS)
        # Two requests are under way, so that the loaders need not wait for the next one.
        self._rows = [[plan.reserve(_REQUEST_NEURONS * layout.row_bytes) for _ in range(layout.num_parts)] for _ in range(2)]
        self._slab = Slab(plan.num_bytes)
        self._pool = LoaderPool(store, self._slab, regions, depth=threads // loaders)
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
        return self._pool.scatter(0, positions, slots, self._rows[turn])

    def __enter__(self) -> "_Loaders":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
        self._slab.close()


def _plain_loop(file: Path, offsets: np.ndarray, length: int, threads: int, seconds: float) -> float:
    """Bytes a second of threads that do nothing but read random rows past the page cache."""
    descriptor = _open_direct(file)
    counts = [0] * threads
    stop = time.perf_counter() + seconds

    def read(number: int) -> None:
        rng = np.random.default_rng(number)
        buffer = [memoryview(mmap.mmap(-1, -(-length // 4096) * 4096))[:length]]
        while time.perf_counter() < stop:
            for offset in rng.choice(offsets, 64).tolist():
                os.preadv(descriptor, buffer, offset)
            counts[number] += 64

    began = time.perf_counter()
    workers = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.close(descriptor)
    return sum(counts) * length / (time.perf_counter() - began)


def _open_direct(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise InflashError(f"{file}: direct I/O is refused here ({error.strerror}); measure on a disk that allows it") from error


def _fio(file: Path, length: int, threads: int, seconds: float) -> float:
    command = [
        "fio", "--name=read", f"--filename={file}", "--readonly", "--rw=randread", "--direct=1", "--ioengine=psync",
        f"--bs={length}", f"--numjobs={threads}", "--thread", "--time_based", f"--runtime={max(1, round(seconds))}",
        "--group_reporting", "--output-format=json", "--randrepeat=0", "--norandommap",
        f"--filesize={file.stat().st_size // length * length}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise InflashError(f"fio ended with {result.returncode}: {result.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(result.stdout)["jobs"][0]["read"]["bw_bytes"])
