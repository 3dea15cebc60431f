"""Is a store what its metadata says? Every bundle and tensor against its checksum, every array against the layout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import InflashError
from .layout import TensorSpec, bundles_path, checksums_path, neuron_order_path, resident_layers, resident_specs, storage_dtype
from .predictor_layout import predictor_specs
from .readers import DirectReader, read_checksums, verify_blocks
from .resident import load_tensors
from .shard_index import RawArray, open_raw_array
from .store import Store


def find_faults(store: Store, *, most: int = 10, progress: Callable[[int], object] = lambda num_bytes: None) -> list[str]:
    """The first `most` faults, one sentence each; empty when the store is sound.

    Args:
      store: an opened store.
      most: stop after so many.
      progress: called with the number of bytes just checked.
    """
    faults: list[str] = []
    for layer in range(store.config.num_layers):
        for check in (_neuron_faults, _order_faults):
            faults += _guarded(check, store, layer)
            if len(faults) >= most:
                return faults[:most]
        progress(store.bundles.layer_bytes)
    for layer in resident_layers(store.config):
        faults += _guarded(_resident_faults, store, layer)
    for name in store.predictors:
        for layer in range(store.config.num_layers):
            faults += _guarded(_predictor_faults, store, layer, name)
    return faults[:most]


def _guarded(check: Callable[..., list[str]], *arguments: object) -> list[str]:
    """A check's faults; an array that cannot even be opened is a fault, too."""
    try:
        return check(*arguments)
    except (InflashError, OSError) as error:
        return [str(error)]


def _neuron_faults(store: Store, layer: int) -> list[str]:
    layout = store.bundles
    array = open_raw_array(store.path / bundles_path(layer))
    if fault := _shape_fault(array, store.path / bundles_path(layer), layout.shape, layout.bundle_bytes):
        return [fault]
    checksums = read_checksums(store.path, layer)
    if checksums.shape != (layout.num_neurons,):
        return [f"{store.path / checksums_path(layer)}: expected {layout.num_neurons} checksums, found {checksums.shape[0]}"]
    with DirectReader(store.path, layer) as reader:
        damaged = verify_blocks(reader, checksums, layout.shape, storage_dtype(store.dtype))
    order = store.neuron_order(layer)
    return [f"layer {layer}, neuron {order[position]}: its bundle does not match its checksum" for position in damaged]


def _order_faults(store: Store, layer: int) -> list[str]:
    order = store.neuron_order(layer)
    if not np.array_equal(np.sort(order), np.arange(store.config.d_ff)):
        return [f"{store.path / neuron_order_path(layer)}: expected each of {store.config.d_ff} neurons once"]
    return []


def _resident_faults(store: Store, layer: int | None) -> list[str]:
    _load(store.resident_folder(layer), resident_specs(store.config, layer, store.dtype))
    return []


def _predictor_faults(store: Store, layer: int, name: str) -> list[str]:
    _load(store.predictor_folder(name, layer), predictor_specs(store.config, store.predictors[name], layer))
    return []


def _load(folder: Path, specs: tuple[TensorSpec, ...]) -> None:
    """Through Orbax, as any other reader would; loading checks shapes, dtypes and checksums."""
    for _ in load_tensors(folder, specs, verify=True):
        pass


def _shape_fault(array: RawArray, path: Path, shape: tuple[int, ...], row_bytes: int) -> str | None:
    if array.shape != shape or array.row_bytes != row_bytes:
        return f"{path}: expected {shape}, {row_bytes} bytes a neuron, found {array.shape}, {array.row_bytes}"
    return None
