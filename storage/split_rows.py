"""The layout that bundles are better than: each part's rows in an array of their own, so that a neuron is two reads. For comparisons.

Axes: F d_ff, D d_model.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import InflashError
from .layout import bundles_path, rows_path, storage_dtype
from .shard_index import open_raw_array
from .store import Store, write_bundles

_BLOCK_BYTES = 32 << 20


@contextmanager
def split_rows(store: Store, folder: Path, progress: Callable[[int], object] = lambda written: None) -> Iterator[Path]:
    """Copies a store's neurons into `folder`, split by part, in the order of the bundles; the copy goes when the block ends.

    Raises:
      InflashError: the folder exists, or the disk is too full.
    """
    import zarr

    needed = store.config.num_layers * store.bundles.layer_bytes
    if folder.exists():
        raise InflashError(f"{folder}: already exists; remove it or choose another name")
    if (free := shutil.disk_usage(folder.parent).free) < needed * 1.01:
        raise InflashError(
            f"{folder.parent}: a copy without bundles needs {needed / 2**30:.2f} GiB, found {free / 2**30:.2f} GiB free"
        )
    try:
        group = zarr.open_group(str(folder), mode="w", zarr_format=3)
        layout = replace(store.bundles, num_parts=1)
        for layer in range(store.config.num_layers):
            for part in range(store.bundles.num_parts):
                write_bundles(folder, group, rows_path(layer, part), layout, _rows(store, layer, part, progress))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rows(store: Store, layer: int, part: int, progress: Callable[[int], object]) -> Iterator[np.ndarray]:
    """[n, 1, D] of one part, block after block."""
    layout, dtype = store.bundles, storage_dtype(store.dtype)
    array = open_raw_array(store.path / bundles_path(layer))
    block = max(1, _BLOCK_BYTES // layout.bundle_bytes)
    for start in range(0, layout.num_neurons, block):
        count = min(block, layout.num_neurons - start)
        bundles = np.fromfile(
            array.file, dtype, count * layout.bundle_bytes // dtype.itemsize, offset=int(array.row_offsets[start])
        )
        rows = bundles.reshape(count, layout.num_parts, layout.d_model)[:, part : part + 1]
        progress(rows.nbytes)
        yield rows
