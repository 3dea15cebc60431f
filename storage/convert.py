"""Conversion: a checkpoint in, a store out, a block of neurons or a tensor at a time.

Axes: F d_ff, P parts, D d_model, n neurons of a block.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InflashError
from .checkpoint import CheckpointSource
from .layout import (
    PART_NAMES,
    TOKENIZER_FOLDER,
    BundleLayout,
    bundles_path,
    dtype_of,
    neuron_bytes,
    resident_bytes,
    resident_layers,
    resident_specs,
)
from .low_rank import WANTED_RECALL, default_rank, low_rank_predictor
from .predictor_layout import LOW_RANK, PredictorInfo
from .predictor_store import save_predictor_layer
from .resident import save_tensors
from .store import Store, StoreWriter, open_store, remove_leftovers, writing_store
from .tokenizer_files import copy_tokenizer
from .verify import find_faults

BLOCK_BYTES = 32 << 20
PREDICTOR_NAME = "svd"

Progress = Callable[[int], object]
"""Told of every stretch of bytes written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenPredictor:
    """A predictor that comes with the checkpoint.

    Attributes:
      name, info: as in the store.
      tensors: makes those of `predictor_specs` for a layer.
    """

    name: str
    info: PredictorInfo
    tensors: Callable[[int], Mapping[str, np.ndarray]]


def bytes_to_write(source: CheckpointSource, dtype: str) -> int:
    """Size of the store's weights, for the progress bar and the check of free space; predictors add at most 5 %."""
    return resident_bytes(source.config, dtype) + neuron_bytes(source.config, dtype)


def convert(
    source: CheckpointSource,
    destination: Path,
    *,
    dtype: str = "auto",
    predictor_rank: int | None = None,
    predictors: Sequence[GivenPredictor] = (),
    progress: Progress = lambda written: None,
) -> Store:
    """Writes the store `destination` from a checkpoint.

    Args:
      source: an opened checkpoint.
      destination: must not exist; appears when the store is whole and its neurons were read back and checked.
      dtype: the weights' dtype in the store; "auto" keeps the checkpoint's.
      predictor_rank: rank of the training-free predictor; None chooses it, 0 leaves the predictor out.
      predictors: further ones to write.
      progress: called with the number of bytes just written.

    Raises:
      InflashError: the destination exists, space is short, or the checkpoint contradicts its config.
    """
    dtype = source.dtype if dtype == "auto" else dtype
    dtype_of(dtype)
    rank = default_rank(source.config.d_model, source.config.d_ff) if predictor_rank is None else predictor_rank
    if not 0 <= rank <= source.config.d_model:
        raise InflashError(f"predictor rank: expected 0 to d_model = {source.config.d_model}, found {rank}")
    remove_leftovers(destination)
    _check_space(destination, int(bytes_to_write(source, dtype) * 1.06) + (64 << 20))
    with writing_store(destination, source.config, dtype, source.description) as writer:
        for layer in resident_layers(source.config):
            _write_resident(source, writer, layer, progress)
            if layer is not None:
                writer.write_neurons(layer, _neuron_blocks(source, layer, dtype, progress))
                if rank:
                    _write_predictor(source, writer, layer, rank)
                for given in predictors:
                    tensors = given.tensors(layer)
                    save_predictor_layer(writer.predictor_folder(given.name), source.config, given.info, layer, tensors)
                    writer.add_predictor(given.name, given.info)
        if source.tokenizer_folder is not None:
            copy_tokenizer(source.tokenizer_folder, writer.path / TOKENIZER_FOLDER)
        writer.finish()
        if faults := find_faults(open_store(writer.path), most=1):
            raise InflashError(f"{destination}: what was written reads back differently ({faults[0]}); is the disk sound?")
    return open_store(destination)


def _check_space(destination: Path, needed: int) -> None:
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise InflashError(f"{parent}: this folder does not exist; make it first")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InflashError(
            f"{parent}: the store needs {needed / 2**30:.2f} GiB, found {free / 2**30:.2f} GiB free; "
            "free some space or choose another disk"
        )


def _write_resident(source: CheckpointSource, writer: StoreWriter, layer: int | None, progress: Progress) -> None:
    specs = resident_specs(source.config, layer, writer.dtype)

    def tensor(name: str) -> np.ndarray:
        values = source.resident_tensor(name, layer)
        target = next(spec.dtype for spec in specs if spec.name == name)
        progress(values.size * dtype_of(target).itemsize)
        return cast_weights(values, target, name if layer is None else f"layer {layer}: {name}")

    save_tensors(writer.resident_folder(layer), specs, tensor)


def _neuron_blocks(source: CheckpointSource, layer: int, dtype: str, progress: Progress) -> Iterator[np.ndarray]:
    layout = BundleLayout.of(source.config, dtype)
    block = max(1, BLOCK_BYTES // layout.bundle_bytes)
    for start in range(0, layout.num_neurons, block):
        stop = min(start + block, layout.num_neurons)
        bundles = source.neuron_rows(layer, start, stop)
        where = f"neurons {start} to {stop - 1}"
        parts = [
            cast_weights(bundles[:, part], dtype, f"layer {layer}: {name} projection, {where}")
            for part, name in enumerate(PART_NAMES[layout.num_parts])
        ]
        rows = np.stack(parts, axis=1)
        progress(rows.nbytes)
        yield rows


def cast_weights(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The values in a store's dtype; warns, naming the tensor, when any is NaN or infinite.

    Values too large for float16 are the caller's to know about: they become infinite, and the warning says so.
    """
    finite_before = bool(np.isfinite(values).all())
    with np.errstate(over="ignore"):
        cast = values.astype(dtype_of(dtype), copy=False)
    if not finite_before:
        warnings.warn(f"{name}: contains NaN or infinite weights; the model's output may be meaningless", stacklevel=2)
    elif not np.isfinite(cast).all():
        warnings.warn(f"{name}: some weights are too large for {dtype} and became infinite; use another --dtype", stacklevel=2)
    return cast


def _write_predictor(source: CheckpointSource, writer: StoreWriter, layer: int, rank: int) -> None:
    config = source.config
    shard = writer.path / bundles_path(layer) / "c" / "0" / "0" / "0"
    layout = BundleLayout.of(config, writer.dtype)

    def up_blocks() -> Iterator[np.ndarray]:
        rows = max(1, BLOCK_BYTES // layout.bundle_bytes)
        with shard.open("rb") as stream:
            for start in range(0, config.d_ff, rows):
                count = min(rows, config.d_ff - start)
                block = np.fromfile(stream, dtype_of(writer.dtype), count * layout.num_parts * config.d_model)
                yield block.reshape(count, layout.num_parts, config.d_model)[:, 0]

    # The FFN's input comes out of this LayerNorm: the one before the FFN, or the one after attention in post-LN models.
    norm = "ffn_norm" if config.norm_first else "attention_norm"
    predictor = low_rank_predictor(
        up_blocks,
        np.asarray(source.resident_tensor("up_bias", layer), np.float32),
        np.asarray(source.resident_tensor(f"{norm}_scale", layer), np.float32),
        np.asarray(source.resident_tensor(f"{norm}_bias", layer), np.float32),
        rank,
        seed=layer,
    )
    info = PredictorInfo(kind=LOW_RANK, method="svd", ranks=(rank,) * config.num_layers, dtype=writer.dtype, recall=WANTED_RECALL)
    dtype = dtype_of(writer.dtype)
    tensors = {
        "first": predictor.first.astype(dtype),
        "second": predictor.second.astype(dtype),
        "bias": predictor.bias,
        "threshold": predictor.threshold,
    }
    save_predictor_layer(writer.predictor_folder(PREDICTOR_NAME), config, info, layer, tensors)
    writer.add_predictor(PREDICTOR_NAME, info)
