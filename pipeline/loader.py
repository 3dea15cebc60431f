"""A loader process: waits for requests, reads neurons from flash into the slab, reports.

Started by the engine as `python -m inflash.pipeline.loader CONFIG`. It imports NumPy but none of jax, zarr or orbax, so that it is
there in a fraction of a second and costs tens of megabytes. It lives as long as the engine: the engine holds the other end of a pipe,
and when that end closes, however the engine ended, the loader leaves.
"""

import json
import os
import pickle
import queue
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..storage.readers import DirectFile, DirectReader, ReadCount
from .channel import BYTES, COUNTERS, RANGE, RING_LENGTH, SCATTER, Channel, ChannelRegion
from .slab import ALIGNMENT, Slab

_SMALLEST_TASK_BYTES = 64 << 10  # below this a second thread costs more than it brings
_LARGEST_BYTES_TASK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """What a loader is told at birth; descriptors are inherited."""

    store: str
    files: tuple[str, ...]
    d_model: int
    num_parts: int
    item_bytes: int
    threads: int
    verify: bool
    slab_bytes: int
    slab_descriptor: int
    wake_descriptor: int
    done_descriptor: int
    lifeline_descriptor: int
    error_descriptor: int
    region: ChannelRegion

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LoaderConfig":
        document = json.loads(text)
        document["region"] = ChannelRegion(**document["region"])
        document["files"] = tuple(document["files"])
        return cls(**document)


class _Request:
    """One request on its way: the number of its tasks that are not finished."""

    __slots__ = ("number", "remaining")

    def __init__(self, number: int, remaining: int) -> None:
        self.number = number
        self.remaining = remaining


class Loader:
    """Serves one channel with a few threads; `os.preadv` runs outside Python's global lock."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config
        self._slab = Slab(config.slab_bytes, config.slab_descriptor)
        self._channel = Channel(self._slab, config.region)
        self._readers: dict[int, DirectReader] = {}
        self._files: dict[int, DirectFile] = {}
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._served = 0
        for _ in range(config.threads - 1):
            threading.Thread(target=self._work, daemon=True).start()

    def serve(self) -> None:
        """Runs until the engine is gone."""
        poll = select.poll()
        poll.register(self._config.wake_descriptor, select.POLLIN)
        poll.register(self._config.lifeline_descriptor, select.POLLIN)
        while True:
            # The timeout only bounds how long a lost wake-up could last; none is known.
            for descriptor, _ in poll.poll(1000):
                if descriptor == self._config.lifeline_descriptor:
                    return
                os.eventfd_read(self._config.wake_descriptor)
            newest = int(self._channel.submitted[0])
            while self._served < newest:
                self._served += 1
                self._accept(self._served)

    def _accept(self, number: int) -> None:
        """Cuts a request into tasks; this thread does the last one itself."""
        try:
            tasks = self._split(self._channel.requests[number % RING_LENGTH])
        except Exception as error:
            self._report(error)
            return
        request = _Request(number, len(tasks))
        for task in tasks[:-1]:
            self._tasks.put((request, task))
        self._run(request, tasks[-1])
        while self._config.threads == 1 or not self._tasks.empty():
            try:
                self._run(*self._tasks.get_nowait())
            except queue.Empty:
                return

    def _work(self) -> None:
        while True:
            self._run(*self._tasks.get())

    def _run(self, request: _Request, task: Callable[[], ReadCount]) -> None:
        began = time.perf_counter_ns()
        try:
            count = task()
        except Exception as error:
            self._report(error)
            return
        busy_ns = time.perf_counter_ns() - began
        with self._lock:
            counters = self._channel.counters
            counters += np.array([count.reads, count.num_bytes, busy_ns, 0], np.uint64)
            request.remaining -= 1
            finished = request.remaining == 0
            if finished:
                counters[COUNTERS.index("requests")] += np.uint64(1)
                self._channel.done[request.number % RING_LENGTH] = request.number
        if finished:
            os.eventfd_write(self._config.done_descriptor, 1)

    def _split(self, record: np.void) -> list[Callable[[], ReadCount]]:
        kind, source, start, count = (int(record[name]) for name in ("kind", "source", "start", "count"))
        if kind == BYTES:
            return self._split_bytes(source, start, count, int(record["parts"][0]))
        if kind == SCATTER:
            positions = self._channel.positions[start : start + count].copy()
            slots = self._channel.slots[start : start + count].copy()
        elif kind == RANGE:
            positions = np.arange(start, start + count)
            slots = np.arange(int(record["slot"]), int(record["slot"]) + count)
        else:
            raise ValueError(f"request of unknown kind {kind}")
        config = self._config
        top = int(slots.max()) + 1
        dtype = np.dtype(f"u{config.item_bytes}")
        parts = [self._slab.array(int(o), (top, config.d_model), dtype) for o in record["parts"][: config.num_parts]]
        reader = self._reader(source)
        bundle_bytes = config.num_parts * config.d_model * config.item_bytes
        pieces = max(1, min(config.threads, count * bundle_bytes // _SMALLEST_TASK_BYTES))
        bounds = np.linspace(0, count, pieces + 1).astype(int).tolist()
        return [
            lambda first=first, last=last: reader.read(positions[first:last], slots[first:last], parts)
            for first, last in pairwise(bounds)
        ]

    def _split_bytes(self, source: int, start: int, count: int, target: int) -> list[Callable[[], ReadCount]]:
        file = self._file(source)
        direct = file.can_read_directly(ALIGNMENT, target, start) and count % ALIGNMENT == 0

        def read(first: int, last: int) -> ReadCount:
            view = memoryview(self._slab.array(target + first, (last - first,), np.uint8))
            return ReadCount(file.read([view], start + first, last - first, direct), last - first)

        step = max(_LARGEST_BYTES_TASK, -(-count // (64 * ALIGNMENT)) * ALIGNMENT)
        return [lambda first=first: read(first, min(first + step, count)) for first in range(0, count, step)]

    def _reader(self, layer: int) -> DirectReader:
        if layer not in self._readers:
            self._readers[layer] = DirectReader(Path(self._config.store), layer, verify=self._config.verify)
        return self._readers[layer]

    def _file(self, number: int) -> DirectFile:
        if number not in self._files:
            self._files[number] = DirectFile(Path(self._config.files[number]))
        return self._files[number]

    def _report(self, error: Exception) -> None:
        """Sends the exception itself and where it happened; the engine raises it again."""
        text = "".join(traceback.format_exception(error))
        try:
            message = pickle.dumps((error, text))
        except Exception:  # an exception that cannot travel is told in words
            message = pickle.dumps((RuntimeError(repr(error)), text))
        with self._lock:
            os.write(self._config.error_descriptor, len(message).to_bytes(8, "little") + message)


def main() -> None:
    # Ctrl-C reaches the whole terminal group; the engine decides when loaders stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # the engine says once for all loaders when reads are not direct
    Loader(LoaderConfig.from_json(sys.argv[1])).serve()
    os._exit(0)  # threads may still be inside a read that nobody waits for


if __name__ == "__main__":
    main()
