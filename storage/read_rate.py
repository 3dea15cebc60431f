"""How fast a file can be read past the page cache: our own read queue with nothing around it."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import InflashError
from .large_pages import contiguous_memory
from .read_plan import SEGMENT, ReadPlan
from .read_queue import open_read_queue

_PLANNED_READS = 4096


def read_rate(file: Path, file_bytes: int, size: int, depth: int, seconds: float, *, in_order: bool = False) -> float:
    """Bytes a second of direct reads of one size, so many under way, at random places or one after the other.

    Raises:
      InflashError: the file system refuses direct reads, or the disk gives less than was asked for.
    """
    descriptor = _open_direct(file)
    memory = contiguous_memory(depth * size)  # else the rate would depend on how scattered this machine's memory is just now
    blocks = max(1, file_bytes // size)
    rng = np.random.default_rng()
    # In order from anywhere: what was read the last time may still be in somebody's cache.
    places = (rng.integers(blocks) + np.arange(_PLANNED_READS)) % blocks if in_order else rng.integers(0, blocks, _PLANNED_READS)
    segments = np.empty(_PLANNED_READS, SEGMENT)
    segments["address"] = memory.ctypes.data + size * (np.arange(_PLANNED_READS) % depth)
    segments["length"] = size
    plan = ReadPlan(
        offsets=places.astype(np.int64) * size,
        lengths=np.full(_PLANNED_READS, size),
        first_segments=np.arange(_PLANNED_READS + 1),
        segments=segments,
    )
    queue = open_read_queue(depth, direct=True)
    try:
        reads = queue.prepare(descriptor, plan, 0)
        began, back, at, done = time.perf_counter(), 0, 0, False
        while not done or queue.under_way:  # what is still under way at the end counts, too
            done = done or time.perf_counter() - began >= seconds
            if not done:
                at = (at + queue.submit(reads, at)) % _PLANNED_READS
            tags, results = queue.reap(queue.under_way if done else max(1, min(depth // 4, 16)), 1.0)
            if (results != size).any():
                raise InflashError(
                    f"{file}: a read of {size} bytes came back with {results[results != size][0]}; is the disk sound?"
                )
            back += len(tags)
        return back * size / (time.perf_counter() - began)
    finally:
        queue.close()
        os.close(descriptor)


def worthwhile_gap(points: Iterable[tuple[int, float]]) -> int:
    """Bytes that cost no more to read along than another read costs; 0 where small reads lose nothing.

    A read takes `start + size / bandwidth` when many are under way; the gap's own time has to stay below `start`.

    Args:
      points: sizes of reads and bytes a second; of one size the fastest counts.
    """
    best: dict[int, float] = {}
    for size, rate in points:
        best[size] = max(rate, best.get(size, 0.0))
    sizes = sorted(best)
    if len(sizes) < 2:
        return 0
    seconds = [size / best[size] for size in sizes]
    bandwidth = (sizes[-1] - sizes[0]) / max(seconds[-1] - seconds[0], 1e-12)
    return max(0, int((seconds[0] - sizes[0] / bandwidth) * bandwidth))


def _open_direct(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise InflashError(f"{file}: direct I/O is refused here ({error.strerror}); measure on a disk that allows it") from error
