import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import flip_byte, fresh_seed

from inflash.errors import InflashError
from inflash.storage.checksum import bundle_checksums, crc32c, joined_checksum
from inflash.storage.shard_index import open_raw_array, write_index


def write_array(folder: Path, values: np.ndarray, *, chunk_rows: int = 1, index_location: str = "end", **options) -> None:
    """One shard of raw rows by zarr-python, unless `options` say otherwise."""
    shards = {"shape": values.shape, "index_location": index_location}
    settings = {"chunks": (chunk_rows, *values.shape[1:]), "shards": shards, "compressors": None, "fill_value": 0}
    settings |= {"filters": None, "config": {"write_empty_chunks": True}, **options}
    zarr.create_array(str(folder), shape=values.shape, dtype=values.dtype, **settings)[:] = values


def rows_of(folder: Path) -> list[bytes]:
    array = open_raw_array(folder)
    content = array.file.read_bytes()
    return [content[offset : offset + array.row_bytes] for offset in array.row_offsets.tolist()]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "int32"])
@pytest.mark.parametrize("index_location", ["start", "end"])
@pytest.mark.parametrize("chunk_rows", [1, 3])
def test_finds_the_rows_that_zarr_wrote(tmp_path: Path, dtype: str, index_location: str, chunk_rows: int) -> None:
    rng = np.random.default_rng(fresh_seed())
    shape = (3 * int(rng.integers(1, 9)), *rng.integers(1, 7, rng.integers(0, 3)).tolist())
    values = rng.integers(0, 200, shape).astype(dtype)
    write_array(tmp_path / "array", values, chunk_rows=chunk_rows, index_location=index_location)
    array = open_raw_array(tmp_path / "array")
    assert (array.shape, array.row_bytes) == (shape, values[0].nbytes)
    assert rows_of(tmp_path / "array") == [row.tobytes() for row in values]


@given(num_chunks=st.integers(1, 40), chunk_bytes=st.integers(1, 10**6))
def test_written_indexes_hold_offsets_lengths_and_their_checksum(num_chunks: int, chunk_bytes: int) -> None:
    encoded = write_index(num_chunks, chunk_bytes)
    entries = np.frombuffer(encoded[:-4], "<u8").reshape(num_chunks, 2)
    assert entries[:, 0].tolist() == [number * chunk_bytes for number in range(num_chunks)]
    assert set(entries[:, 1].tolist()) == {chunk_bytes}
    assert int.from_bytes(encoded[-4:], "little") == crc32c(encoded[:-4])


def test_crc32c_is_the_standards() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value in the catalogue of CRCs
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_checksums_of_bundles_and_of_their_parts_agree(dtype: type) -> None:
    rng = np.random.default_rng(fresh_seed())
    bundles = rng.integers(0, 200, (5, 2, 7)).astype(dtype)
    sums = bundle_checksums(bundles)
    assert sums.tolist() == [crc32c(bundle.tobytes()) for bundle in bundles]
    assert sums.tolist() == [joined_checksum(list(bundle)) for bundle in bundles]


@pytest.mark.parametrize(
    "options",
    [
        {"compressors": "auto"},
        {"shards": None},
        {"shards": (4, 6)},
        {"chunks": (1, 3), "shards": (8, 6)},
    ],
    ids=["compressed", "no shard", "two shards", "chunks across a row"],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, options: dict) -> None:
    write_array(tmp_path / "array", np.ones((8, 6), np.float32), **options)
    with pytest.raises(InflashError, match=r"zarr\.json: expected one shard of uncompressed rows, found another layout"):
        open_raw_array(tmp_path / "array")


def test_a_missing_row_is_named(tmp_path: Path) -> None:
    """Zarr's default leaves chunks of zeros out."""
    values = np.ones((8, 6), np.float32)
    values[5] = 0
    write_array(tmp_path / "array", values, config={"write_empty_chunks": False})
    with pytest.raises(InflashError, match="row 5 is not stored"):
        open_raw_array(tmp_path / "array")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_array(tmp_path / "array", np.random.default_rng(fresh_seed()).standard_normal((8, 6)).astype(np.float32))
    return tmp_path / "array"


def shard(folder: Path) -> Path:
    return folder / "c" / "0" / "0"


def test_a_missing_array(tmp_path: Path) -> None:
    with pytest.raises(InflashError, match=r"array: expected a Zarr array, found no zarr\.json"):
        open_raw_array(tmp_path / "array")


def test_a_missing_shard(folder: Path) -> None:
    shard(folder).unlink()
    with pytest.raises(InflashError, match="the shard is missing"):
        open_raw_array(folder)


@pytest.mark.parametrize(
    "content", [
        b"", b"{", b"[]", b"{}", b'{"node_type": "group"}', b"\xff", b'{"node_type": "array", "data_type": "uint8"}',
        *(b'{"node_type": "array", "data_type": "uint8", "shape": %b}' % shape for shape in (b"3", b"[]", b'["a"]', b"[-1]", b"null")),
    ],
)  # fmt: skip
def test_damaged_metadata(folder: Path, content: bytes) -> None:
    (folder / "zarr.json").write_bytes(content)
    with pytest.raises(InflashError, match=r"zarr\.json: expected the metadata of a numeric Zarr array"):
        open_raw_array(folder)


def test_metadata_without_codecs(folder: Path) -> None:
    metadata = json.loads((folder / "zarr.json").read_text())
    metadata["codecs"] = []
    (folder / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(InflashError, match="found another layout"):
        open_raw_array(folder)


def test_every_byte_of_the_index_is_guarded(folder: Path) -> None:
    size = shard(folder).stat().st_size
    for offset in range(size - (8 * 16 + 4), size):
        flip_byte(shard(folder), offset)
        with pytest.raises(InflashError, match="the shard index is damaged"):
            open_raw_array(folder)
        flip_byte(shard(folder), offset)
    open_raw_array(folder)


def test_a_torn_shard(folder: Path) -> None:
    whole = shard(folder).read_bytes()
    shard(folder).write_bytes(whole[:50])
    with pytest.raises(InflashError, match=r"expected at least 132 bytes of shard index, found a file of 50"):
        open_raw_array(folder)
    shard(folder).write_bytes(whole[150:])  # the index is whole, the rows are not
    with pytest.raises(InflashError, match="its index points past its end"):
        open_raw_array(folder)
    shard(folder).write_bytes(whole[:-20])
    with pytest.raises(InflashError, match="the shard index is damaged"):
        open_raw_array(folder)


def test_chunks_of_another_length(folder: Path) -> None:
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(content[: -(8 * 16 + 4)] + write_index(8, 20))
    with pytest.raises(InflashError, match=r"expected chunks of 24 bytes, found \{20\}"):
        open_raw_array(folder)
