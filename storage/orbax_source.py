"""An Orbax checkpoint of the canonical tensors as the source of a conversion, for models that never were in Hugging Face's format.

Axes: F d_ff, P parts of a bundle (up, down), D d_model.

The directory holds `inflash.json`, an object of `config` (`ModelConfig.to_json()`) and `dtype` (of the feed-forward matrices), and,
in `params/`, an Orbax PyTree checkpoint of the tree

    {"embeddings": {name: array, ...}, "layers": {"0": {name: array, ..., "up": [F, D], "down": [F, D]}, "1": ...}}

where name and shape of each array are those of `layout.resident_specs` and its dtype is float32, bfloat16 or float16. A tokenizer
may lie beside them. `save_orbax_source` writes such a directory; `PyTreeCheckpointer().save(path / "params", tree)` does for a tree
of JAX arrays.

Orbax restores a leaf whole or not at all. A feed-forward matrix should be read some rows at a time, so leaves are opened by
TensorStore, which Orbax keeps them with.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InflashError
from .json_files import read_json_object
from .layout import DTYPES, PART_NAMES, dtype_of, resident_layers, resident_specs
from .model_config import ModelConfig

MANIFEST = "inflash.json"
_PARAMS = "params"
_BLOCK_BYTES = 64 << 20  # of a leaf that are decoded at a time
_CHUNK_BYTES = 8 << 20  # of a leaf that are encoded together, and can only be decoded together


class OrbaxSource:
    """See `checkpoint.CheckpointSource`. Every leaf's presence, shape and dtype is checked at once, before anything is read.

    Raises:
      InflashError: the checkpoint is damaged, or contradicts its `inflash.json`.
    """

    def __init__(self, path: Path) -> None:
        manifest = path / MANIFEST
        document = read_json_object(manifest)
        if document.keys() != {"config", "dtype"} or not isinstance(document["config"], dict):
            raise InflashError(f"{manifest}: expected the object config and the string dtype, found the keys {sorted(document)}")
        try:
            self.config = ModelConfig.from_json(document["config"])
            dtype_of(document["dtype"])
        except (InflashError, TypeError) as error:
            raise InflashError(f"{manifest}: {error}") from error
        self.dtype: str = document["dtype"]
        self.description = str(path)
        self.tokenizer_folder: Path | None = path
        self._leaves = _open_leaves(path / _PARAMS, self.config)
        self._part_names = PART_NAMES[self.config.num_parts]
        first = _leaf_name(self._part_names[0], 0)
        _check_first(path / _PARAMS, first, _dtype_name(self._leaves[first]), self.dtype)

    def resident_tensor(self, name: str, layer: int | None) -> np.ndarray:
        leaf = self._leaves[_leaf_name(name, layer)]
        return _read_rows(leaf, 0, leaf.shape[0])

    def neuron_rows(self, layer: int, start: int, stop: int) -> np.ndarray:
        leaves = [self._leaves[_leaf_name(part, layer)] for part in self._part_names]
        names = {_dtype_name(leaf) for leaf in leaves}
        dtype = dtype_of(names.pop() if len(names) == 1 else "float32")
        rows = np.empty((stop - start, len(leaves), self.config.d_model), dtype)
        for place, leaf in enumerate(leaves):
            rows[:, place] = _read_rows(leaf, start, stop)
        return rows

    def close(self) -> None:
        self._leaves = {}

    def __enter__(self) -> "OrbaxSource":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def save_orbax_source(path: Path, config: ModelConfig, dtype: str, tensors: Mapping[str, Any]) -> None:
    """Writes a directory that `open_source` reads.

    Args:
      path: a directory that does not exist yet.
      config: the model.
      dtype: canonical name of the feed-forward matrices' dtype.
      tensors: the tree of the module's docstring; leaves are NumPy or JAX arrays.

    Raises:
      InflashError: the path exists, or the tree lacks a tensor or has one of another shape or dtype.
    """
    import orbax.checkpoint as ocp

    if path.exists():
        raise InflashError(f"{path}: already exists; give a path that does not")
    dtype_of(dtype)
    tree: dict[str, dict[str, Any]] = {part: dict(tensors.get(part, {})) for part in ("embeddings", "layers")}
    expected = dict(_expected_leaves(config))
    found = {_leaf_name(name, None): leaf for name, leaf in tree["embeddings"].items()}
    for layer, leaves in tree["layers"].items():
        found.update({_leaf_name(name, layer): leaf for name, leaf in leaves.items()})
    if found.keys() != expected.keys():
        raise InflashError(
            f"{path}: expected exactly the config's tensors, differing in {sorted(found.keys() ^ expected.keys())}"
        )
    for name, leaf in found.items():
        _check_leaf(path, name, tuple(leaf.shape), np.dtype(leaf.dtype).name, expected[name])
    first = _leaf_name(PART_NAMES[config.num_parts][0], 0)
    _check_first(path, first, np.dtype(found[first].dtype).name, dtype)
    chunked = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)  # so that some rows can be read without decoding all
    save_args = {
        "embeddings": dict.fromkeys(tree["embeddings"], chunked),
        "layers": {layer: dict.fromkeys(leaves, chunked) for layer, leaves in tree["layers"].items()},
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute() / _PARAMS, args=ocp.args.PyTreeSave(tree, save_args=save_args))
    # Last, because the manifest is what makes the directory a checkpoint.
    (path / MANIFEST).write_text(json.dumps({"config": config.to_json(), "dtype": dtype}, indent=1) + "\n", encoding="utf-8")


def _leaf_name(name: str, layer: int | str | None) -> str:
    """Orbax's name of a leaf: its keys joined by dots."""
    return f"embeddings.{name}" if layer is None else f"layers.{layer}.{name}"


def _expected_leaves(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in resident_layers(config):
        for spec in resident_specs(config, layer, "float32"):
            yield _leaf_name(spec.name, layer), spec.shape
        if layer is not None:
            for part in PART_NAMES[config.num_parts]:
                yield _leaf_name(part, layer), (config.d_ff, config.d_model)


def _open_leaves(params: Path, config: ModelConfig) -> dict[str, Any]:
    """Every leaf's TensorStore."""
    import tensorstore

    metadata = params / "_METADATA"
    if not metadata.exists():
        raise InflashError(
            f"{params}: expected an Orbax PyTree checkpoint, found no {metadata.name}; a save may not have finished"
        )
    driver = "zarr3" if read_json_object(metadata).get("use_zarr3") else "zarr"
    files = {"driver": "file", "path": f"{params.absolute()}/"}
    joined = (params / "manifest.ocdbt").exists()
    leaves: dict[str, Any] = {}
    for name, shape in _expected_leaves(config):
        if joined:
            kvstore = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
        else:
            kvstore = {"driver": "file", "path": f"{params.absolute()}/{name}/"}
        try:
            leaf = tensorstore.open({"driver": driver, "kvstore": kvstore}, read=True).result()
        except ValueError as error:
            raise InflashError(f"{params}: tensor {name} cannot be opened ({_reason(error)})") from error
        _check_leaf(params, name, tuple(leaf.shape), _dtype_name(leaf), shape)
        leaves[name] = leaf
    return leaves


def _check_leaf(where: Path, name: str, shape: tuple[int, ...], dtype: str, expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise InflashError(f"{where}: tensor {name} should have shape {expected} by its config, found {shape}")
    if dtype not in DTYPES:
        raise InflashError(f"{where}: tensor {name} should be one of {', '.join(DTYPES)}, found {dtype}")


def _check_first(where: Path, name: str, dtype: str, expected: str) -> None:
    if dtype != expected:
        raise InflashError(f"{where}: tensor {name} should be {expected}, as its checkpoint's dtype says, found {dtype}")


def _read_rows(leaf: Any, start: int, stop: int) -> np.ndarray:
    """Rows start to stop of a leaf, in blocks of whole chunks: a chunk is decoded whole, whatever part of it is asked for."""
    rows = np.empty((stop - start, *leaf.shape[1:]), leaf.dtype.numpy_dtype)
    chunk = leaf.chunk_layout.read_chunk.shape[0]
    row_bytes = rows.itemsize * int(np.prod(leaf.shape[1:]))
    block = chunk * max(1, _BLOCK_BYTES // (chunk * row_bytes))
    begin = start
    while begin < stop:
        end = min(stop, (begin // block + 1) * block)
        try:
            rows[begin - start : end - start] = leaf[begin:end].read().result()
        except ValueError as error:
            raise InflashError(f"{leaf.kvstore.url}: cannot be read ({_reason(error)})") from error
        begin = end
    return rows


def _dtype_name(leaf: Any) -> str:
    return leaf.dtype.numpy_dtype.name


def _reason(error: ValueError) -> str:
    """TensorStore's message without the specification that it appends."""
    return str(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
