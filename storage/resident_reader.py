"""Resident tensors and predictors straight from their files: what `load_tensors` of `resident` gives, without Orbax and in small blocks.

Orbax costs a process 130 MB and two seconds to import, and holds whole checkpoints. Their leaves are raw Zarr arrays, so a run
reads them as it reads neurons, by byte range. `inflash verify` goes through Orbax.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import InflashError
from .layout import TensorSpec, dtype_of
from .resident import Piece, checksum_of, open_leaf, pieces, read_checksums
from .shard_index import RawArray

_BLOCK_BYTES = 16 << 20  # what is held beside the tensor that it goes to


def read_tensors(
    folder: Path,
    specs: tuple[TensorSpec, ...],
    *,
    skip: frozenset[str] = frozenset(),
    verify: bool = False,
    remedy: str = "convert the model again",
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yields the group `folder` in order, some rows of a tensor at a time.

    Args:
      folder: what `resident.save_tensors` wrote.
      specs: the group's tensors.
      skip: names of tensors that are not wanted.
      verify: compare every leaf with its checksum, for which it is read whole.
      remedy: what to do about damage.

    Raises:
      InflashError: the group is missing, cannot be read, contradicts its specs, or is damaged and `verify` is set.
    """
    checksums = read_checksums(folder, remedy) if verify else {}
    for number, checkpoint in enumerate(pieces(specs)):
        for piece in (piece for piece in checkpoint if piece.spec.name not in skip):
            array, dtype = open_leaf(folder / str(number), piece), dtype_of(piece.spec.dtype)
            rows = piece.stop - piece.start
            step = rows if verify else max(1, _BLOCK_BYTES // array.row_bytes)
            for first in range(0, rows, step):
                block = _read_rows(array, first, min(step, rows - first)).view(dtype).reshape(-1, *piece.spec.shape[1:])
                if verify and checksums.get(f"{number}/{piece.spec.name}") != (found := checksum_of(block)):
                    raise InflashError(
                        f"{folder / str(number) / piece.spec.name}: expected checksum {checksums.get(f'{number}/{piece.spec.name}')}, "
                        f"found {found}; the store is damaged, {remedy}"
                    )
                yield Piece(spec=piece.spec, start=piece.start + first, stop=piece.start + first + len(block)), block


def _read_rows(array: RawArray, first: int, count: int) -> np.ndarray:
    """The bytes of rows that follow each other in the file. They leave the page cache, where they would stand beside the copy."""
    offset, length = int(array.row_offsets[first]), count * array.row_bytes
    if int(array.row_offsets[first + count - 1]) != offset + length - array.row_bytes:
        raise InflashError(
            f"{array.file}: expected its rows in order; only stores written by `inflash convert` can be read directly"
        )
    descriptor = os.open(array.file, os.O_RDONLY)
    try:
        content = np.empty(length, np.uint8)
        done = 0
        while done < length:
            if not (more := os.preadv(descriptor, [memoryview(content)[done:]], offset + done)):
                raise InflashError(f"{array.file}: expected {length} bytes at {offset}, found its end; is the store whole?")
            done += more
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
        return content
    finally:
        os.close(descriptor)
