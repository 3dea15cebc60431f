"""A loader process: waits for requests, reads neurons from flash into the slab, reports.

Started by the engine as `python -m inflash.pipeline.loader CONFIG`. It imports NumPy but none of jax, zarr or orbax, so that it is
there in a fraction of a second and costs tens of megabytes. It lives as long as the engine: the engine holds the other end of a pipe,
and when that end closes, however the engine ended, the loader leaves.
"""

import contextlib
import json
import mmap
import os
import pickle
import select
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..storage.layout import rows_path
from ..storage.read_plan import plan_bytes
from ..storage.read_queue import open_read_queue
from ..storage.readers import DirectFile, DirectReader
from .channel import BYTES, COUNTERS, RANGE, RING_LENGTH, ROWS, SCATTER, Channel, ChannelRegion
from .read_schedule import ReadSchedule, Request, first_tag
from .slab import ALIGNMENT, Slab
from .staging import Staging, is_staged
from .trace import READ, REQUEST, attach, flow_of, recorder

_LOOK_UP_S = 0.0005  # how long a new request may go unnoticed while reads are under way


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """What a loader is told at birth; descriptors are inherited."""

    store: str
    split_rows: str
    files: tuple[str, ...]
    d_model: int
    num_parts: int
    item_bytes: int
    depth: int
    direct: bool
    merge_gap: int
    verify: bool
    slab_bytes: int
    slab_large: tuple[tuple[int, int], ...]
    slab_descriptor: int
    wake_descriptor: int
    done_descriptor: int
    lifeline_descriptor: int
    error_descriptor: int
    trace_descriptor: int | None  # None: nobody wants to know
    trace_writer: int
    region: ChannelRegion

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LoaderConfig":
        document = json.loads(text)
        document["region"] = ChannelRegion(**document["region"])
        document["files"] = tuple(document["files"])
        return cls(**document)


class Loader:
    """Serves one channel from one thread, with up to `depth` reads under way."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config
        self._slab = Slab(config.slab_bytes, config.slab_descriptor, config.slab_large)
        self._channel = Channel(self._slab, config.region)
        self._readers: dict[tuple[int, int | None], DirectReader] = {}
        self._files: dict[int, DirectFile] = {}
        self._queue = open_read_queue(config.depth, direct=config.direct)
        self._schedule = ReadSchedule(self._queue)
        self._trace = recorder()
        self._scratch = mmap.mmap(-1, max(config.merge_gap, ALIGNMENT))
        self._scratch_address = np.frombuffer(self._scratch, np.uint8).ctypes.data
        self._staging, self._dtype = Staging(), np.dtype(f"u{config.item_bytes}")
        self._served = 0
        self._counted_until = 0  # ns, of the time that is counted as busy

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
                self._take_call()
            self._counted_until = time.perf_counter_ns()
            self._accept_new()
            if self._schedule:
                self._work()

    def _work(self) -> None:
        """Reads until nothing is left to read, taking new requests meanwhile."""
        while self._schedule:
            self._schedule.begin(int(self._channel.awaited[0]))
            self._note_under_way()
            # Neurons that are asked for meanwhile are what the engine waits for.
            until = self._config.wake_descriptor if self._schedule.between_neurons else None
            waiting = self._trace.begin(READ)
            tags, results = self._queue.reap(self._schedule.worth_waiting_for(), _LOOK_UP_S, until)
            back_ns = time.perf_counter_ns()
            self._note_under_way()
            self._count(reads=len(tags))
            if until is not None:
                self._take_call()
            for request in self._schedule.take_back(tags, results):
                self._finish(request)
            self._trace.end(waiting, len(tags), at_ns=back_ns)  # when the engine goes on already
            self._accept_new()

    def _take_call(self) -> None:
        """The engine has called, or has not: what it asks for is looked at next."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._config.wake_descriptor)

    def _accept_new(self) -> None:
        newest = int(self._channel.submitted[0])
        while self._served < newest:
            self._served += 1
            record = self._channel.requests[self._served % RING_LENGTH]
            layer = -1 if record["kind"] == BYTES else int(record["source"])
            span = self._trace.begin(REQUEST, layer, 0, self._flow(self._served))
            try:
                request = self._plan(self._served, record)
            except Exception as error:
                self.report(error)
                continue
            request.span = span
            if request.remaining:
                self._schedule.add(request)
            else:
                self._finish(request)

    def _finish(self, request: Request) -> None:
        try:
            request.complete()
        except Exception as error:
            self.report(error)
            return
        plan, now = request.reads.plan, time.perf_counter_ns()
        self._count(
            bytes=request.num_bytes,
            gap_bytes=plan.num_bytes - request.num_bytes,
            busy_ns=now - self._counted_until,
            requests=1,
        )
        self._counted_until = now
        self._channel.done[request.number % RING_LENGTH] = request.number
        os.eventfd_write(self._config.done_descriptor, 1)
        # Nobody waits for these.
        self._trace.end(request.span, request.num_bytes, self._flow(request.number), at_ns=now)
        self._trace.count_reads(plan.lengths, in_order=request.in_order)

    def _flow(self, number: int) -> int:
        return flow_of(self._config.trace_writer - 1, number)

    def _note_under_way(self) -> None:
        self._channel.counters[COUNTERS.index("under_way")] = self._queue.under_way

    def _count(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self._channel.counters[COUNTERS.index(name)] += np.uint64(amount)

    def _plan(self, number: int, record: np.void) -> Request:
        kind, source, start, count = (int(record[name]) for name in ("kind", "source", "start", "count"))
        if kind == BYTES:
            return self._plan_bytes(number, source, start, count, int(record["parts"][0]))
        if kind == RANGE:
            return self._plan_range(number, source, start, count, int(record["slot"]), record["parts"])
        if kind not in (SCATTER, ROWS):
            raise ValueError(f"request of unknown kind {kind}")
        positions = self._channel.positions[start : start + count].copy()
        slots = self._channel.slots[start : start + count].copy()
        part = int(record["slot"]) if kind == ROWS else None
        return self._plan_listed(number, source, positions, slots, int(record["parts"][0]), part, ahead=bool(record["ahead"]))

    def _plan_listed(
        self, number: int, layer: int, positions: np.ndarray, slots: np.ndarray, offset: int, part: int | None, *, ahead: bool
    ) -> Request:
        """Single neurons to slots of bundles, or one part of them."""
        config, reader = self._config, self._reader(layer, part)
        bundles = self._slab.array(offset, (int(slots.max()) + 1, config.num_parts, config.d_model), self._dtype)
        parts = list(bundles.swapaxes(0, 1)) if part is None else [bundles[:, part]]
        gaps = {"merge_gap": config.merge_gap, "scratch": self._scratch_address}
        address = parts[0].ctypes.data
        if part is None:
            plan = reader.plan_bundles(positions, slots, address, **gaps)
        else:
            plan = reader.plan(positions, slots * config.num_parts, [address], **gaps)
        reads = self._queue.prepare(reader.descriptor([address]), plan, first_tag(number))
        num_bytes = len(positions) * len(parts) * parts[0][0].nbytes
        return Request(number, reads, reader.file, num_bytes, lambda: reader.check(positions, slots, parts), ahead=ahead)

    def _plan_range(self, number: int, layer: int, start: int, count: int, slot: int, offsets: np.ndarray) -> Request:
        """A stretch of neurons, each part's rows to slots in order."""
        config, reader = self._config, self._reader(layer, None)
        positions, slots = np.arange(start, start + count), np.arange(slot, slot + count)
        parts = [self._slab.array(int(o), (slot + count, config.d_model), self._dtype) for o in offsets[: config.num_parts]]
        row_bytes = parts[0][0].nbytes
        num_bytes = count * len(parts) * row_bytes
        if is_staged(row_bytes, num_bytes):
            return self._plan_staged(number, reader, positions, slots, parts)
        addresses = [part.ctypes.data for part in parts]
        reads = self._queue.prepare(reader.descriptor(addresses), reader.plan(positions, slots, addresses), first_tag(number))
        return Request(number, reads, reader.file, num_bytes, lambda: reader.check(positions, slots, parts), in_order=True)

    def _plan_staged(
        self, number: int, reader: DirectReader, positions: np.ndarray, slots: np.ndarray, parts: list[np.ndarray]
    ) -> Request:
        """A stretch of neurons, read in one piece and then put into its rows."""
        num_bytes = len(positions) * len(parts) * parts[0][0].nbytes
        memory = self._staging.take(num_bytes)
        plan = reader.plan_bundles(positions, np.arange(len(positions)), memory.ctypes.data)
        reads = self._queue.prepare(reader.descriptor([memory.ctypes.data]), plan, first_tag(number))

        def check() -> None:
            bundles = memory[:num_bytes].view(self._dtype).reshape(len(positions), len(parts), -1)
            for part, rows in zip(parts, bundles.swapaxes(0, 1), strict=True):
                part[slots[0] : slots[0] + len(rows)] = rows
            self._staging.give_back(memory)
            reader.check(positions, slots, parts)

        return Request(number, reads, reader.file, num_bytes, check, in_order=True)

    def _plan_bytes(self, number: int, source: int, start: int, count: int, target: int) -> Request:
        file = self._file(source)
        direct = count % ALIGNMENT == 0 and file.can_read_directly(ALIGNMENT, target, start)
        plan = plan_bytes(start, count, self._slab.array(target, (count,), np.uint8).ctypes.data)
        reads = self._queue.prepare(file.descriptor(direct), plan, first_tag(number))
        return Request(number, reads, file, count, lambda: None, in_order=True)

    def _reader(self, layer: int, part: int | None) -> DirectReader:
        """Of a layer's bundles, or of one part's rows where those lie apart."""
        if (layer, part) not in self._readers:
            if part is None:
                reader = DirectReader(Path(self._config.store), layer, verify=self._config.verify)
            else:
                reader = DirectReader(Path(self._config.split_rows), layer, path=rows_path(layer, part))
            self._readers[layer, part] = reader
        return self._readers[layer, part]

    def _file(self, number: int) -> DirectFile:
        if number not in self._files:
            self._files[number] = DirectFile(Path(self._config.files[number]))
        return self._files[number]

    def report(self, error: Exception) -> None:
        """Sends the exception itself and where it happened; the engine raises it again."""
        text = "".join(traceback.format_exception(error))
        try:
            message = pickle.dumps((error, text))
        except Exception:  # an exception that cannot travel is told in words
            message = pickle.dumps((RuntimeError(repr(error)), text))
        os.write(self._config.error_descriptor, len(message).to_bytes(8, "little") + message)


def main() -> None:
    # Ctrl-C reaches the whole terminal group, and so may SIGTERM (timeout, systemd); the engine decides when loaders stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # the engine says once for all loaders when reads are not direct
    config = LoaderConfig.from_json(sys.argv[1])
    if config.trace_descriptor is not None:
        attach(config.trace_descriptor, config.trace_writer)
    loader = Loader(config)
    try:
        loader.serve()
    except Exception as error:  # of the queue itself: there is no going on, but the engine should say why
        loader.report(error)
    recorder().flush()
    os._exit(0)  # reads may still be under way that nobody waits for


if __name__ == "__main__":
    main()
