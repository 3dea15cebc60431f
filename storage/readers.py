"""From byte ranges on flash to rows in memory: two readers behind one contract.

Axes: F d_ff, P parts of a bundle, D d_model, S slots, n neurons asked for.

A bundle is one byte range on flash because one large read is cheaper than two small ones. In memory it stays one, [P, D], where neurons are
picked singly: a disk fills one piece of memory faster than two. Where they come in order its rows go apart, each to its part's own array
[S, D], because kernels for many tokens want whole matrices of up rows and of down rows. Reference: arXiv:2312.11514, 3.2.
"""

import mmap
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from ..errors import InflashError
from .checksum import bundle_checksums, joined_checksum
from .layout import bundles_path, checksums_path
from .read_plan import ReadPlan, plan_rows
from .read_queue import read_now, read_rest
from .shard_index import RawArray, open_raw_array

_DIRECT = getattr(os, "O_DIRECT", 0)
_SECTOR_BYTES = 512  # the smallest alignment that any disk asks for; a probe finds those that ask for more


@dataclass(frozen=True, slots=True)
class ReadCount:
    """What a call has read: system calls (or chunk fetches) and bytes."""

    reads: int
    num_bytes: int


class BundleReader(Protocol):
    """Reads neurons of one layer into slots."""

    def read(self, positions: np.ndarray, slots: np.ndarray, parts: Sequence[np.ndarray]) -> ReadCount:
        """Fills `parts[p][slots[i]]` with part p of the neuron at `positions[i]`.

        Args:
          positions: [n] places in the layer, ascending.
          slots: [n] rows to fill.
          parts: P arrays [S, D] of the store's item size, C-contiguous and writable.

        Raises:
          RunError: the file ends before the neuron.
          InflashError: a neuron is damaged, where the reader was asked to verify.
        """
        ...

    def close(self) -> None: ...


class ZarrReader:
    """The reference: zarr-python reads the chunks. Right by construction and slow; tests and `inflash verify` use it."""

    def __init__(self, store: Path, layer: int) -> None:
        import zarr

        self._array = zarr.open_array(str(store), path=bundles_path(layer), mode="r")

    def read(self, positions: np.ndarray, slots: np.ndarray, parts: Sequence[np.ndarray]) -> ReadCount:
        if len(positions) == 0:
            return ReadCount(0, 0)
        bundles = np.asarray(self._array.get_orthogonal_selection((np.asarray(positions),)))
        for number, part in enumerate(parts):
            part[slots] = bundles[:, number].view(part.dtype)
        return ReadCount(len(positions), bundles.nbytes)

    def close(self) -> None:
        pass


class DirectFile:
    """A file read past the page cache where the file system and the alignment allow it, else through it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffered = _open(path, os.O_RDONLY)
        self._direct: int | None = None
        self._tried: dict[tuple[int, int, int], bool] = {}
        if _DIRECT:
            try:
                self._direct = os.open(path, os.O_RDONLY | _DIRECT)
            except OSError:  # tmpfs and others refuse the flag itself
                self._direct = None

    def can_read_directly(self, segment_bytes: int, address: int, offset: int) -> bool:
        """Whether scattered direct reads in units of `segment_bytes` work here; asks the disk by trying one, once an alignment."""
        if self._direct is None or segment_bytes % _SECTOR_BYTES or address % _SECTOR_BYTES or offset % _SECTOR_BYTES:
            return False
        alignment = segment_bytes, address % 4096, offset % 4096
        if alignment not in self._tried:
            self._tried[alignment] = self._try(self._direct, segment_bytes, address, offset)
        return self._tried[alignment]

    @staticmethod
    def _try(descriptor: int, segment_bytes: int, address: int, offset: int) -> bool:
        room = np.empty(segment_bytes + 4096, np.uint8)
        # The trial's address has the very alignment that later reads will have.
        start = (address - room.ctypes.data) % 4096
        try:
            return os.preadv(descriptor, [memoryview(room)[start : start + segment_bytes]], offset) == segment_bytes
        except OSError:
            return False

    def descriptor(self, direct: bool) -> int:
        """To read with; `direct` as `can_read_directly` says."""
        return self._direct if direct and self._direct is not None else self._buffered

    def finish(self, plan: ReadPlan, read: int, result: int) -> None:
        """Completes one read of a plan, whose `result` is what the kernel said: bytes, or an error number below zero.

        Raises:
          RunError: the file ends before the read does.
          OSError: the disk refuses.
        """
        length, offset = int(plan.lengths[read]), int(plan.offsets[read])
        if result < 0:
            error = OSError(-result, os.strerror(-result), str(self.path))
            error.add_note(f"while reading {length} bytes at {offset}")
            raise error
        if result < length:
            read_rest(self._buffered, plan, read, result, self.path)

    def close(self) -> None:
        for descriptor in (self._buffered, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._direct = None


class DirectReader:
    """The hot path: byte ranges resolved once, `preadv` to wherever rows or bundles belong, neighbours merged into one call.

    `read` goes through one read after the other; loaders take `plan` and keep many reads under way. Thread-safe: the descriptors
    carry no position.

    Attributes:
      file: the layer's shard.
    """

    def __init__(self, store: Path, layer: int, *, verify: bool = False, path: str | None = None) -> None:
        """Opens a layer's bundles, or another array of rows below `store` at `path`."""
        self._layer = layer
        self._array: RawArray = open_raw_array(store / (path or bundles_path(layer)))
        self.file = DirectFile(self._array.file)
        self._num_parts = self._array.shape[1]
        self._row_bytes = self._array.row_bytes // self._num_parts
        self._checksums = read_checksums(store, layer) if verify else None

    def read(self, positions: np.ndarray, slots: np.ndarray, parts: Sequence[np.ndarray]) -> ReadCount:
        if len(positions) == 0:
            return ReadCount(0, 0)
        plan = self.plan(positions, slots, [part.ctypes.data for part in parts])
        descriptor = self.descriptor([part.ctypes.data for part in parts])
        for read in range(len(plan)):
            self.file.finish(plan, read, read_now(descriptor, plan, read))
        self.check(positions, slots, parts)
        return ReadCount(len(plan), plan.num_bytes)

    def plan(
        self, positions: np.ndarray, slots: np.ndarray, addresses: Sequence[int], *, merge_gap: int = 0, scratch: int = 0
    ) -> ReadPlan:
        """The reads for `read`; `addresses` are those of the P arrays, the rest as in `plan_rows`."""
        rows = np.asarray(slots, np.uint64)[:, None] * np.uint64(self._row_bytes) + np.asarray(addresses, np.uint64)[None]
        return plan_rows(self._array.row_offsets[positions], rows, self._row_bytes, merge_gap=merge_gap, scratch=scratch)

    def plan_bundles(
        self, positions: np.ndarray, slots: np.ndarray, address: int, *, merge_gap: int = 0, scratch: int = 0
    ) -> ReadPlan:
        """Reads of whole bundles, each to its slot of an array [S, P, D] at this address; the rest as in `plan_rows`."""
        size = self._num_parts * self._row_bytes
        addresses = np.uint64(address) + np.asarray(slots, np.uint64) * np.uint64(size)
        return plan_rows(self._array.row_offsets[positions], addresses[:, None], size, merge_gap=merge_gap, scratch=scratch)

    def descriptor(self, addresses: Sequence[int]) -> int:
        """To read rows of the arrays at these addresses with: direct where that works."""
        direct = self.is_direct(addresses)
        if not direct:
            warn_buffered(self.file.path, self._row_bytes)
        return self.file.descriptor(direct)

    def is_direct(self, addresses: Sequence[int]) -> bool:
        """Whether reads into rows of the arrays at these addresses go past the page cache."""
        offset = int(self._array.row_offsets[0])
        return all(self.file.can_read_directly(self._row_bytes, address, offset) for address in addresses)

    def check(self, positions: np.ndarray, slots: np.ndarray, parts: Sequence[np.ndarray]) -> None:
        """Compares what was read with the checksums, where the reader was asked to verify.

        Raises:
          InflashError: a neuron is damaged.
        """
        if self._checksums is None:
            return
        for position, slot in zip(positions.tolist(), slots.tolist(), strict=True):
            found = joined_checksum([part[slot] for part in parts])
            if found != self._checksums[position]:
                raise InflashError(
                    f"{self.file.path}: layer {self._layer}, neuron at position {position}: expected checksum "
                    f"{int(self._checksums[position]):08x}, found {found:08x}; the store is damaged, convert the model again"
                )

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_checksums(store: Path, layer: int) -> np.ndarray:
    """[F] uint32, the stored checksums of one layer's bundles."""
    array = open_raw_array(store / checksums_path(layer))
    return np.fromfile(array.file, "<u4", array.shape[0], offset=int(array.row_offsets[0]))


def verify_blocks(reader: BundleReader, checksums: np.ndarray, shape: tuple[int, int, int], dtype: np.dtype) -> list[int]:
    """Positions of one layer whose bundle does not match its checksum, read in blocks of at most 8 MiB."""
    num_neurons, num_parts, d_model = shape
    block = max(1, (8 << 20) // (num_parts * d_model * dtype.itemsize))
    # Anonymous mappings begin on a page, which direct reads ask for.
    room = block * d_model * dtype.itemsize
    parts = [np.frombuffer(mmap.mmap(-1, room), dtype).reshape(block, d_model) for _ in range(num_parts)]
    damaged: list[int] = []
    for start in range(0, num_neurons, block):
        count = min(block, num_neurons - start)
        reader.read(np.arange(start, start + count), np.arange(count), parts)
        found = bundle_checksums(np.stack([part[:count] for part in parts], axis=1))
        damaged += (start + np.flatnonzero(found != checksums[start : start + count])).tolist()
    return damaged


_warned = threading.Event()


def warn_buffered(path: Path, row_bytes: int) -> None:
    """Says once a process that reads go through the page cache."""
    if not _warned.is_set():
        _warned.set()
        warnings.warn(
            f"{path}: direct I/O is refused for rows of {row_bytes} bytes here, so reads go through the page cache; "
            "results are the same, speed and memory use are not",
            RuntimeWarning,
            stacklevel=3,
        )


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        raise InflashError(f"{path}: cannot be opened: {error.strerror}") from error
