"""Many reads under way at a time, for few instructions each.

Random reads of a few KiB are fast only if dozens are under way, and then the processor is the scarce thing: a thread and a system call for
each costs 10 to 18 us. Linux's asynchronous I/O takes and returns them in batches from one thread, for 4 to 5 us each. It needs no library:
four system calls over arrays of fixed layout (`linux/aio_abi.h`), which NumPy writes. Where it is not there (other systems, some
containers), or would not be asynchronous (files read through the page cache), threads do the same job.
"""

import ctypes
import errno
import math
import os
import platform
import queue
import select
import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import RunError
from .read_plan import ReadPlan

_CONTROL = np.dtype(
    [
        ("data", "<u8"), ("key", "<u4"), ("rw_flags", "<i4"), ("opcode", "<u2"), ("priority", "<i2"), ("descriptor", "<u4"),
        ("segments", "<u8"), ("num_segments", "<u8"), ("offset", "<i8"), ("reserved", "<u8"), ("flags", "<u4"), ("notify", "<u4"),
    ]
)  # fmt: skip
_EVENT = np.dtype([("data", "<u8"), ("control", "<u8"), ("result", "<i8"), ("second", "<i8")])
_PREADV = 7
_CALLS = {  # setup, destroy, getevents, submit
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
    "riscv64": (0, 1, 4, 2),
}
_NOTIFY = 1  # the flag that says that a control block's `notify` counts
_MOST_THREADS = 8  # more in one Python process lose again

_libc = ctypes.CDLL(None, use_errno=True)
_libc.preadv.restype = ctypes.c_long
_system_call = _libc.syscall
_system_call.restype, _system_call.argtypes = ctypes.c_long, [ctypes.c_long] * 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedReads:
    """A plan's reads in the form in which a queue takes them.

    Attributes:
      descriptor: of the file.
      plan: the reads.
      tag: of the first; read i has `tag + i`.
      controls: [r] of the kernel's control blocks; none for other queues.
      pointers: [r] uint64, where each of them is.
    """

    descriptor: int
    plan: ReadPlan
    tag: int
    controls: np.ndarray | None = None
    pointers: np.ndarray | None = None


class ReadQueue(Protocol):
    """Reads under way. Every read has a tag of the caller's, by which its result comes back.

    Attributes:
      depth: reads that may be under way.
      under_way: reads that are.
    """

    depth: int
    under_way: int

    def prepare(self, descriptor: int, plan: ReadPlan, tag: int) -> PreparedReads:
        """A plan's reads, all at once, tagged `tag + i` for read i; they have to live until all of them are back."""
        ...

    def submit(self, reads: PreparedReads, first: int, most: int | None = None) -> int:
        """Begins reads from the given one on, at most so many (None: all); returns how many were taken, maybe fewer."""
        ...

    def reap(self, least: int, timeout_s: float, until: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Waits until `least` reads are back or the time is over: their tags [n] int64, and their results [n] int64.

        A result is a number of bytes, or an error number below zero.

        Args:
          until: a descriptor; what is back when it can be read, or when any read is, is enough. It may be nothing.
        """
        ...

    def close(self) -> None: ...


class KernelQueue:
    """Linux's asynchronous I/O."""

    def __init__(self, depth: int) -> None:
        """Raises OSError where the system has none."""
        if platform.system() != "Linux" or platform.machine() not in _CALLS:
            raise OSError(errno.ENOSYS, "no asynchronous I/O known for this system")
        self._setup, self._destroy, self._getevents, self._submit = _CALLS[platform.machine()]
        self.depth, self.under_way = depth, 0
        context = np.zeros(1, np.int64)
        self._call(self._setup, depth, context.ctypes.data)
        self._context = int(context[0])
        self._events = np.zeros(depth, _EVENT)
        self._time = np.zeros(2, np.int64)
        self._events_address, self._time_address = self._events.ctypes.data, self._time.ctypes.data
        self._returns = _Returns()

    def prepare(self, descriptor: int, plan: ReadPlan, tag: int) -> PreparedReads:
        controls = np.zeros(len(plan), _CONTROL)
        controls["data"] = np.arange(tag, tag + len(plan))
        controls["opcode"] = _PREADV
        controls["flags"], controls["notify"] = _NOTIFY, self._returns.descriptor
        controls["descriptor"] = descriptor
        controls["segments"] = plan.segments.ctypes.data + plan.segments.itemsize * plan.first_segments[:-1]
        controls["num_segments"] = np.diff(plan.first_segments)
        controls["offset"] = plan.offsets
        pointers = controls.ctypes.data + _CONTROL.itemsize * np.arange(len(plan), dtype=np.uint64)
        return PreparedReads(descriptor=descriptor, plan=plan, tag=tag, controls=controls, pointers=pointers)

    def submit(self, reads: PreparedReads, first: int, most: int | None = None) -> int:
        count = min(len(reads.plan) - first, self.depth - self.under_way, self.depth if most is None else most)
        if count <= 0:
            return 0
        assert reads.pointers is not None
        try:
            taken = self._call(self._submit, self._context, count, reads.pointers.ctypes.data + reads.pointers.itemsize * first)
        except BlockingIOError:  # the kernel is short of something for a moment
            return 0
        self.under_way += taken
        return taken

    def reap(self, least: int, timeout_s: float, until: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        if until is not None:
            self._returns.wait(timeout_s, until)
            least, timeout_s = 0, 0.0
        self._time[:] = divmod(round(timeout_s * 1e9), 1_000_000_000)
        try:
            count = self._call(self._getevents, self._context, least, self.depth, self._events_address, self._time_address)
        except InterruptedError:
            count = 0
        self.under_way -= count
        events = self._events[:count]
        return events["data"].astype(np.int64), events["result"].copy()

    def close(self) -> None:
        if self._context:
            self._call(self._destroy, self._context)  # waits for what is under way
            self._context = 0
            self._returns.close()

    @staticmethod
    def _call(number: int, *arguments: int) -> int:
        result = _system_call(number, *arguments, *(0,) * (5 - len(arguments)))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result


class ThreadQueue:
    """Threads that call `preadv`, which runs outside Python's global lock."""

    def __init__(self, depth: int) -> None:
        self.depth, self.under_way = depth, 0
        self._returns = _Returns()
        self._todo: queue.SimpleQueue = queue.SimpleQueue()
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(depth, _MOST_THREADS))]
        for thread in self._threads:
            thread.start()

    def prepare(self, descriptor: int, plan: ReadPlan, tag: int) -> PreparedReads:
        return PreparedReads(descriptor=descriptor, plan=plan, tag=tag)

    def submit(self, reads: PreparedReads, first: int, most: int | None = None) -> int:
        count = max(0, min(len(reads.plan) - first, self.depth - self.under_way, self.depth if most is None else most))
        for read in range(first, first + count):
            self._todo.put((reads.tag + read, reads.descriptor, reads.plan, read))
        self.under_way += count
        return count

    def reap(self, least: int, timeout_s: float, until: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        if until is not None:
            self._returns.wait(timeout_s, until)
            least, timeout_s = min(self._done.qsize(), self.under_way), 0.0
        found = []
        try:
            while len(found) < least or (found and not self._done.empty()):
                found.append(self._done.get(timeout=timeout_s))
        except queue.Empty:
            pass
        self.under_way -= len(found)
        back = np.array(found, np.int64).reshape(-1, 2)
        return back[:, 0], back[:, 1]

    def close(self) -> None:
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        self._returns.close()

    def _work(self) -> None:
        while (item := self._todo.get()) is not None:
            tag, descriptor, plan, read = item
            self._done.put((tag, read_now(descriptor, plan, read)))
            os.eventfd_write(self._returns.descriptor, 1)


class _Returns:
    """Counts reads that come back, so that one can wait for the next of them and for something else at a time.

    Attributes:
      descriptor: of the counter; who has a read back adds one.
    """

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self.descriptor, select.POLLIN)

    def wait(self, timeout_s: float, until: int) -> None:
        """Until a read has come back since the last time, or `until` can be read, or the time is over."""
        self._poll.register(until, select.POLLIN)
        if any(descriptor == self.descriptor for descriptor, _ in self._poll.poll(math.ceil(timeout_s * 1e3))):
            os.eventfd_read(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


def open_read_queue(depth: int, *, direct: bool) -> ReadQueue:
    """The best queue for this system. `direct`: files are read past the page cache."""
    if direct:
        try:
            return KernelQueue(depth)
        except OSError:  # not Linux, or forbidden here, or all of the system's are taken
            pass
    return ThreadQueue(depth)


def read_now(descriptor: int, plan: ReadPlan, read: int) -> int:
    """Does one read of a plan: bytes read, or an error number below zero."""
    return _preadv(descriptor, plan.segments_of(read), int(plan.offsets[read]))


def read_rest(descriptor: int, plan: ReadPlan, read: int, done: int, name: object) -> None:
    """Reads what a read of `plan` has left over after `done` bytes; a signal or the kernel's own limit may cut one short.

    Args:
      descriptor: of the file, buffered, because the rest may not begin on a sector.
      name: of the file, for errors.

    Raises:
      RunError: the file ends too soon.
      OSError: the disk refuses.
    """
    offset, length = int(plan.offsets[read]), int(plan.lengths[read])
    while done < length:
        more = _preadv(descriptor, _skip(plan.segments_of(read), done), offset + done)
        if more < 0:
            raise OSError(-more, os.strerror(-more))
        if more == 0:
            raise RunError(f"{name}: expected {length} bytes at {offset}, found the file's end; convert the model again")
        done += more


def _preadv(descriptor: int, segments: np.ndarray, offset: int) -> int:
    """Bytes read, or an error number below zero."""
    result = _libc.preadv(
        ctypes.c_int(descriptor), ctypes.c_void_p(segments.ctypes.data), ctypes.c_int(len(segments)), ctypes.c_long(offset)
    )
    return result if result >= 0 else -ctypes.get_errno()


def _skip(segments: np.ndarray, done: int) -> np.ndarray:
    """The segments without their first `done` bytes."""
    ends = np.cumsum(segments["length"].astype(np.int64))
    first = int(np.searchsorted(ends, done, side="right"))
    rest = segments[first:].copy()
    inside = done - (int(ends[first - 1]) if first else 0)
    rest["address"][0] += inside
    rest["length"][0] -= inside
    return rest
