"""Byte ranges of a raw Zarr v3 array, resolved once from its metadata and shard index, without zarr.

Loader processes start in a fraction of zarr's import time and then read millions of ranges, so they need this much of the format
and no more: one shard, inner chunks along the first axis, stored as plain little-endian bytes. Everything else is refused by name;
zarr itself reads the same files in the tests and in `inflash verify`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InflashError
from .checksum import crc32c

_INDEX_ENTRY_BYTES = 16  # offset and length, uint64 each
_INDEX_CHECKSUM_BYTES = 4
_MISSING = np.uint64(2**64 - 1)
_ITEM_BYTES = {"uint8": 1, "uint16": 2, "bfloat16": 2, "float16": 2, "uint32": 4, "int32": 4, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class RawArray:
    """An array whose rows (entries along the first axis) are byte ranges of one file.

    Attributes:
      file: the shard.
      data_type: Zarr's name of it.
      shape: of the whole array.
      row_bytes: bytes of one row.
      row_offsets: [shape[0]] int64, where each row starts in the file.
    """

    file: Path
    data_type: str
    shape: tuple[int, ...]
    row_bytes: int
    row_offsets: np.ndarray


def open_raw_array(folder: Path) -> RawArray:
    """Resolves the rows of the Zarr array in `folder`.

    Raises:
      InflashError: the metadata is missing or describes another layout, or the shard is missing, torn or has a damaged index.
    """
    metadata = _read_metadata(folder)
    shape = metadata["shape"]
    chunk_rows, index_first = _inner_chunks(folder, metadata, shape)
    num_chunks = -(-shape[0] // chunk_rows)
    file = folder.joinpath("c", *("0" for _ in shape))
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * _ITEM_BYTES[metadata["data_type"]]
    index = _read_index(file, num_chunks, index_first)
    if (index == _MISSING).any():
        chunk = int(np.flatnonzero((index == _MISSING).any(axis=1))[0])
        raise InflashError(f"{file}: row {chunk * chunk_rows} is not stored; convert the model again")
    if (index[:, 1] != chunk_rows * row_bytes).any():
        raise InflashError(f"{file}: expected chunks of {chunk_rows * row_bytes} bytes, found {set(index[:, 1].tolist())}")
    size = file.stat().st_size
    if (index.sum(axis=1) > size).any():
        raise InflashError(f"{file}: its index points past its end ({size} bytes); convert the model again")
    rows = np.arange(shape[0])
    offsets = index[rows // chunk_rows, 0].astype(np.int64) + rows % chunk_rows * row_bytes
    return RawArray(file=file, data_type=metadata["data_type"], shape=shape, row_bytes=row_bytes, row_offsets=offsets)


def write_index(num_chunks: int, chunk_bytes: int) -> bytes:
    """The index that ends a shard of `num_chunks` equal chunks laid out in order from the file's start."""
    index = np.empty((num_chunks, 2), "<u8")
    index[:, 0] = np.arange(num_chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
    index[:, 1] = chunk_bytes
    encoded = index.tobytes()
    return encoded + crc32c(encoded).to_bytes(_INDEX_CHECKSUM_BYTES, "little")


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((folder / "zarr.json").read_bytes())
        if metadata["node_type"] != "array" or metadata["data_type"] not in _ITEM_BYTES:
            raise ValueError(f"found {metadata['node_type']} of {metadata.get('data_type')}")
        shape = tuple(metadata["shape"])
        if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"found shape {metadata['shape']}")
        return metadata | {"shape": shape}
    except FileNotFoundError as error:
        raise InflashError(f"{folder}: expected a Zarr array, found no zarr.json; is the store whole?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InflashError(f"{folder / 'zarr.json'}: expected the metadata of a numeric Zarr array: {error}") from error


def _inner_chunks(folder: Path, metadata: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, bool]:
    """Rows of an inner chunk, and whether the index comes first, after checking that nothing stands between file and bytes."""
    try:
        shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = metadata["codecs"]
        inner = sharding["configuration"]
        chunk = inner["chunk_shape"]
        raw = [codec["name"] for codec in inner["codecs"]] == ["bytes"]
        index_codecs = [codec["name"] for codec in inner["index_codecs"]] == ["bytes", "crc32c"]
        whole = tuple(shard) == shape and tuple(chunk[1:]) == shape[1:] and shape[0] % chunk[0] == 0
        if sharding["name"] != "sharding_indexed" or not (raw and index_codecs and whole):
            raise ValueError(f"shard {shard}, inner chunk {chunk}, codecs {[c['name'] for c in inner['codecs']]}")
        return chunk[0], inner.get("index_location", "end") == "start"
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InflashError(
            f"{folder / 'zarr.json'}: expected one shard of uncompressed rows, found another layout ({error}); "
            "only stores written by `inflash convert` can be read directly"
        ) from error


def _read_index(file: Path, num_chunks: int, index_first: bool) -> np.ndarray:
    length = num_chunks * _INDEX_ENTRY_BYTES + _INDEX_CHECKSUM_BYTES
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            if size < length:
                raise InflashError(f"{file}: expected at least {length} bytes of shard index, found a file of {size}")
            stream.seek(0 if index_first else size - length)
            encoded = stream.read(length)
    except FileNotFoundError as error:
        raise InflashError(f"{file}: the shard is missing; convert the model again") from error
    entries, checksum = encoded[:-_INDEX_CHECKSUM_BYTES], encoded[-_INDEX_CHECKSUM_BYTES:]
    if crc32c(entries) != int.from_bytes(checksum, "little"):
        raise InflashError(f"{file}: the shard index is damaged (checksum differs); convert the model again")
    return np.frombuffer(entries, "<u8").reshape(num_chunks, 2)
