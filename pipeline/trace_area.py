"""Where the processes of a run leave their spans: one shared mapping, with a ring of fixed records for each writer.

Axes: n records, L sampled layers, F d_ff.

The mapping is a memfd that somebody other than the writers made and holds, so whatever a writer wrote is there after the writer was
killed. Writer 0 is the engine, writer i is loader i - 1. Each is alone in its region, so nothing is locked. A record is written when its
span begins, before the number that announces it, and completed when the span ends: what was going on when a process died is there, too.

    page 0      what the area is: `AREA_HEADER`
    region i    a page of `WRITER_HEADER` and counts of reads by size, then the ring
    at the end  which neurons were named at the last steps, in a few layers: [STEPS, L, F / 8] bits, after [STEPS] step numbers
"""

import mmap
import os
import time
from dataclasses import dataclass

import numpy as np

from ..errors import RunError

PAGE = 4096
NUM_RECORDS = 1 << 18  # of a ring: some 900 tokens of 24 layers
NAMED_STEPS = 512
SIZE_CLASSES = 40  # reads of up to 2**class bytes

RECORD = np.dtype(
    [
        ("begin_ns", "<i8"),  # CLOCK_MONOTONIC, the same for all processes
        ("end_ns", "<i8"),  # 0: it has not ended
        ("value", "<i8"),  # see `trace.KINDS`
        ("flow", "<i8"),  # likewise; for requests the loader's number and the request's
        ("step", "<u4"),  # the engine's decoding steps, from 0
        ("kind", "<u2"),
        ("layer", "<i2"),  # -1: none
    ]
)
AREA_HEADER = np.dtype(
    [
        ("magic", "<u8"),
        ("num_writers", "<i8"),
        ("num_records", "<i8"),
        ("d_ff", "<i8"),
        ("paused", "<i8"),  # 1: nothing is recorded for a while
        ("sampled", "<i2", (16,)),  # layers whose named neurons are kept; -1: none
    ]
)
WRITER_HEADER = np.dtype(
    [
        ("pid", "<i8"),  # 0: nobody has come
        ("written", "<i8"),  # spans begun since the beginning
        ("reads", "<i8", (2, SIZE_CLASSES)),  # [0]: of neurons picked one by one, [1]: of stretches in order
        ("read_bytes", "<i8", (2, SIZE_CLASSES)),
    ]
)
WRITTEN_AT = 8
PAUSED_AT = 32
_MAGIC = 0x3165636172746669  # "iftrace1"
_CLOCK = "clock_gettime(CLOCK_MONOTONIC)"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterTrace:
    """What one process wrote.

    Attributes:
      number: 0 the engine, i loader i - 1.
      pid: its process id.
      records: [n] of RECORD, in the order in which they began.
      lost: older records that newer ones have replaced.
      reads, read_bytes: [2, SIZE_CLASSES] int64, reads by size and their bytes: of neurons picked one by one, and of stretches in order.
    """

    number: int
    pid: int
    records: np.ndarray
    lost: int
    reads: np.ndarray
    read_bytes: np.ndarray

    @property
    def name(self) -> str:
        return "engine" if self.number == 0 else f"loader {self.number - 1}"


class TraceArea:
    """The mapping, in the process that makes it or in a writer that was given its descriptor."""

    def __init__(self, descriptor: int) -> None:
        """Maps an area that `make` has made.

        Raises:
          RunError: the descriptor is not one of a trace area, or processes have no common clock here.
        """
        if time.get_clock_info("perf_counter").implementation != _CLOCK:
            raise RunError("tracing needs a clock that all processes share (CLOCK_MONOTONIC); this system has none")
        self.descriptor = descriptor
        self.mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self.header = np.frombuffer(self.mapping, AREA_HEADER, 1)[0]
        if int(self.header["magic"]) != _MAGIC:
            raise RunError("the trace's memory was made by another version of inflash; use one version for all processes")
        self.num_writers, self.num_records = int(self.header["num_writers"]), int(self.header["num_records"])
        self.sampled = [layer for layer in self.header["sampled"].tolist() if layer >= 0]
        row_bytes = -(-int(self.header["d_ff"]) // 8)
        at = self.region(self.num_writers)
        self.named_steps = np.frombuffer(self.mapping, np.int64, NAMED_STEPS, at)
        named = np.frombuffer(self.mapping, np.uint8, NAMED_STEPS * len(self.sampled) * row_bytes, at + NAMED_STEPS * 8)
        self.named = named.reshape(NAMED_STEPS, len(self.sampled), row_bytes)

    @classmethod
    def make(cls, *, num_writers: int, num_layers: int, d_ff: int, num_records: int = NUM_RECORDS) -> "TraceArea":
        """A new one. Memory is taken as it is written: 40 bytes a record."""
        sampled = sorted({round(place * (num_layers - 1) / 3) for place in range(4)})
        end = PAGE + num_writers * _region_bytes(num_records) + NAMED_STEPS * (8 + len(sampled) * -(-d_ff // 8))
        descriptor = os.memfd_create("inflash-trace")
        os.ftruncate(descriptor, end)
        header = np.zeros(1, AREA_HEADER)
        header["sampled"] = -1
        header["sampled"][0, : len(sampled)] = sampled
        header["num_writers"], header["num_records"], header["d_ff"] = num_writers, num_records, d_ff
        header["magic"] = _MAGIC
        os.pwrite(descriptor, header.tobytes(), 0)
        area = cls(descriptor)
        area.named_steps[:] = -1
        return area

    def region(self, number: int) -> int:
        """Where a writer's region begins; for the number of writers, where the last one ends."""
        return PAGE + number * _region_bytes(self.num_records)

    def pause(self, paused: bool) -> None:
        """Has all writers record nothing, or go on."""
        self.mapping[PAUSED_AT] = int(paused)

    def writer_header(self, number: int) -> np.void:
        return np.frombuffer(self.mapping, WRITER_HEADER, 1, self.region(number))[0]

    def process_ids(self) -> dict[int, int]:
        """Writers that have come: their process ids by number."""
        found = {number: int(self.writer_header(number)["pid"]) for number in range(self.num_writers)}
        return {number: pid for number, pid in found.items() if pid}

    def read(self, number: int) -> WriterTrace:
        """A copy of what a writer has written; exact once that process is gone."""
        header = self.writer_header(number)
        ring = np.frombuffer(self.mapping, RECORD, self.num_records, self.region(number) + PAGE)
        written = int(header["written"])
        kept = np.arange(max(0, written - self.num_records), written)
        return WriterTrace(
            number=number,
            pid=int(header["pid"]),
            records=ring[kept % self.num_records],
            lost=written - len(kept),
            reads=header["reads"].copy(),
            read_bytes=header["read_bytes"].copy(),
        )

    def named_neurons(self) -> tuple[np.ndarray, np.ndarray]:
        """Which neurons were named: steps [n] int64, ascending, and [n, L, F] bool of the sampled layers."""
        order = np.argsort(self.named_steps, kind="stable")
        order = order[self.named_steps[order] >= 0]
        bits = np.unpackbits(self.named[order], axis=2, count=int(self.header["d_ff"]))
        return self.named_steps[order], bits.astype(bool)

    def close(self) -> None:
        """Gives the descriptor back; the memory goes with the last view of it. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _region_bytes(num_records: int) -> int:
    return PAGE + -(-num_records * RECORD.itemsize // PAGE) * PAGE
