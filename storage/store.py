"""A store on disk: opening and checking one, and writing one that is whole or not there.

A store is written under a temporary name beside its destination and renamed when everything in it is on disk.
"""

import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InflashError
from .checksum import bundle_checksums
from .layout import (
    ATTRIBUTES_KEY,
    FORMAT_VERSION,
    PREDICTORS_FOLDER,
    RESIDENT_FOLDER,
    TOKENIZER_FOLDER,
    BundleLayout,
    bundles_path,
    checksums_path,
    dtype_of,
    neuron_bytes,
    neuron_order_path,
    resident_bytes,
    resident_name,
    resident_specs,
    storage_dtype,
)
from .model_config import ModelConfig
from .predictor_layout import PredictorInfo
from .resident import Piece
from .resident_reader import read_tensors
from .shard_index import open_raw_array, write_index

if TYPE_CHECKING:
    import zarr


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """An opened store: its metadata, and where its parts are. Holds nothing open."""

    path: Path
    config: ModelConfig
    dtype: str
    source: str
    predictors: dict[str, PredictorInfo]

    @property
    def num_bytes(self) -> int:
        """Bytes of the model's weights, without predictors."""
        return resident_bytes(self.config, self.dtype) + neuron_bytes(self.config, self.dtype)

    @property
    def bundles(self) -> BundleLayout:
        return BundleLayout.of(self.config, self.dtype)

    @property
    def tokenizer_folder(self) -> Path:
        return self.path / TOKENIZER_FOLDER

    def resident_folder(self, layer: int | None) -> Path:
        return self.path / RESIDENT_FOLDER / resident_name(layer)

    def load_resident(
        self, layer: int | None, *, skip: frozenset[str] = frozenset(), verify: bool = False
    ) -> Iterator[tuple[Piece, np.ndarray]]:
        """The resident tensors of a layer (None: the embeddings) but those that `skip` names, some rows at a time.

        `verify`: they are compared with their checksums.
        """
        specs = resident_specs(self.config, layer, self.dtype)
        return read_tensors(self.resident_folder(layer), specs, skip=skip, verify=verify)

    def predictor_folder(self, name: str, layer: int) -> Path:
        return self.path / PREDICTORS_FOLDER / name / resident_name(layer)

    def neuron_order(self, layer: int) -> np.ndarray:
        """[F] int64: the neuron at each position of the layer on flash."""
        array = open_raw_array(self.path / neuron_order_path(layer))
        return np.fromfile(array.file, "<i4", array.shape[0], offset=int(array.row_offsets[0])).astype(np.int64)


def open_store(path: Path) -> Store:
    """Opens a store and checks that this version of inflash understands it.

    Raises:
      InflashError: there is no store, it is of a newer format, or its attributes are damaged.
    """
    import json

    try:
        document = json.loads((path / "zarr.json").read_bytes())
        attributes = document["attributes"][ATTRIBUTES_KEY]
        version = attributes["format_version"]
    except FileNotFoundError as error:
        what = "a Hugging Face checkpoint" if (path / "config.json").exists() else "no store"
        hint = f"inflash convert {path} DST" if (path / "config.json").exists() else "inflash convert SRC DST"
        raise InflashError(f"{path}: expected an inflash store, found {what}; make one with `{hint}`") from error
    except NotADirectoryError as error:
        raise InflashError(f"{path}: expected a store's folder, found a file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InflashError(f"{path}/zarr.json: expected the attributes of an inflash store, found other content") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InflashError(
            f"{path}: expected format version {FORMAT_VERSION} or older, found {version}; upgrade inflash, or convert again"
        )
    try:
        return Store(
            path=path,
            config=ModelConfig.from_json(attributes["config"]),
            dtype=_known_dtype(attributes["dtype"]),
            source=str(attributes["source"]),
            predictors={
                str(name): PredictorInfo.from_json(description, attributes["dtype"], attributes["config"]["num_layers"])
                for name, description in attributes.get("predictors", {}).items()
            },
        )
    except InflashError as error:
        raise InflashError(f"{path}/zarr.json: {error}") from error
    except KeyError as error:
        raise InflashError(f"{path}/zarr.json: the attribute {error} is missing; convert the model again") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InflashError(f"{path}/zarr.json: an attribute is damaged ({error}); convert the model again") from error


class StoreWriter:
    """Fills a new store; `writing_store` makes one and renames it when done."""

    def __init__(self, path: Path, config: ModelConfig, dtype: str, source: str) -> None:
        import zarr

        self.path, self.config, self.dtype, self._source = path, config, dtype, source
        self._group = zarr.open_group(str(path), mode="w", zarr_format=3)
        self._bundles = BundleLayout.of(config, dtype)
        self._predictors: dict[str, Any] = {}

    def write_neurons(self, layer: int, blocks: Iterator[np.ndarray]) -> None:
        """Writes one layer's bundles from blocks [n, P, D] that follow each other; n may vary."""
        checksums = []

        def checked() -> Iterator[np.ndarray]:
            for block in blocks:
                checksums.append(bundle_checksums(block))
                yield block

        write_bundles(self.path, self._group, bundles_path(layer), self._bundles, checked())
        self._write_vector(checksums_path(layer), np.concatenate(checksums))
        self._write_vector(neuron_order_path(layer), np.arange(self._bundles.num_neurons, dtype=np.int32))

    def resident_folder(self, layer: int | None) -> Path:
        return self.path / RESIDENT_FOLDER / resident_name(layer)

    def predictor_folder(self, name: str) -> Path:
        return self.path / PREDICTORS_FOLDER / name

    def add_predictor(self, name: str, info: PredictorInfo) -> None:
        self._predictors[name] = info.to_json()

    def finish(self) -> None:
        """Writes the attributes: from here on the folder is a store."""
        self._group.attrs[ATTRIBUTES_KEY] = {
            "format_version": FORMAT_VERSION,
            "config": self.config.to_json(),
            "dtype": self.dtype,
            "source": self._source,
            "bytes": {
                "resident": resident_bytes(self.config, self.dtype),
                "neurons": neuron_bytes(self.config, self.dtype),
            },
            "predictors": self._predictors,
        }

    def _write_vector(self, path: str, vector: np.ndarray) -> None:
        """A small array as one raw shard, so that a reader without zarr finds it the same way as bundles."""
        array = self._group.create_array(
            path,
            shape=vector.shape,
            dtype=vector.dtype,
            chunks=vector.shape,
            shards=vector.shape,
            compressors=None,
            filters=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        array[:] = vector


def write_bundles(folder: Path, group: "zarr.Group", path: str, layout: BundleLayout, blocks: Iterable[np.ndarray]) -> None:
    """Writes an array of bundles as one shard into the group that is in `folder`, from blocks [n, P, D] that follow each other; n may vary.

    The shard's bytes are laid down in order by hand: zarr-python would need the whole layer in memory at once. The result is an
    ordinary shard, which zarr-python reads.
    """
    array = group.create_array(
        path,
        shape=layout.shape,
        dtype=storage_dtype(layout.dtype),
        chunks=(1, *layout.shape[1:]),
        shards=layout.shape,
        compressors=None,
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
        attributes={"dtype": layout.dtype},
    )
    shard = folder / array.path / array.metadata.encode_chunk_key((0, 0, 0))
    shard.parent.mkdir(parents=True, exist_ok=True)
    with shard.open("wb") as stream:
        for block in blocks:
            stream.write(np.ascontiguousarray(block).view(np.uint8).data)
        if stream.tell() != layout.layer_bytes:
            raise InflashError(f"{folder}/{path}: expected {layout.layer_bytes} bytes of neurons, found {stream.tell()}")
        stream.write(write_index(layout.num_neurons, layout.bundle_bytes))
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def writing_store(destination: Path, config: ModelConfig, dtype: str, source: str) -> Iterator[StoreWriter]:
    """A writer whose store appears at `destination` when the block ends, and leaves nothing when it fails.

    Raises:
      InflashError: the destination exists, or its folder does not.
    """
    if destination.exists():
        raise InflashError(f"{destination}: already exists; remove it or choose another name")
    if not destination.absolute().parent.is_dir():
        raise InflashError(f"{destination.absolute().parent}: this folder does not exist; make it first")
    temporary = destination.absolute().with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        writer = StoreWriter(temporary, config, dtype, source)
        yield writer
        writer.finish()
        sync_tree(temporary)
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(destination: Path, kind: str = "partial") -> None:
    """Deletes what killed processes have left beside the destination, such as conversions to it; what a living one makes is left alone."""
    for path in destination.absolute().parent.glob(f".{glob.escape(destination.name)}.{kind}-*"):
        process = path.name.rpartition("-")[2]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(path, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Returns when everything below the folder is on disk."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _known_dtype(name: str) -> str:
    dtype_of(name)
    return name
