"""One contract for both readers, and what only the direct one promises. Axes: F d_ff, P parts, D d_model, S slots."""

import gc
import mmap
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import BUFFERED, flip_byte, write_neurons

from inflash.errors import InflashError, RunError
from inflash.storage import readers
from inflash.storage.layout import bundles_path, storage_dtype
from inflash.storage.readers import (
    BundleReader,
    DirectFile,
    DirectReader,
    ReadCount,
    ZarrReader,
    read_checksums,
    verify_blocks,
)
from inflash.storage.store import Store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

SHAPES = [("bfloat16", 256, 40), ("float16", 96, 33), ("float32", 128, 64), ("float32", 96, 7), ("bfloat16", 5, 3)]
PARTS = 2


def page_aligned(num_slots: int, d_model: int, dtype: np.dtype) -> np.ndarray:
    """[S, D] of bytes that no neuron is likely to have."""
    room = np.frombuffer(mmap.mmap(-1, num_slots * d_model * dtype.itemsize), np.uint8)
    room[:] = 0xA5
    return room.view(dtype).reshape(num_slots, d_model)


def slots_for(store: Store, num_slots: int) -> list[np.ndarray]:
    return [page_aligned(num_slots, store.config.d_model, storage_dtype(store.dtype)) for _ in range(PARTS)]


def shard(store: Store, layer: int = 0) -> Path:
    return store.path / bundles_path(layer) / "c" / "0" / "0" / "0"


def refuses_direct(store: Store) -> bool:
    file = DirectFile(shard(store))
    try:
        return not file.can_read_directly(512, 0, 0)
    finally:
        file.close()


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def neurons(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[np.ndarray]]:
    dtype, d_model, d_ff = request.param
    return write_neurons(tmp_path_factory.mktemp("neurons") / "store", dtype=dtype, d_model=d_model, d_ff=d_ff)


class BundleReaderContract:
    """What every reader does. A subclass says how to make one."""

    def open(self, store: Store, layer: int) -> BundleReader:
        raise NotImplementedError

    @pytest.fixture(params=[0, 1])
    def layer(self, request: pytest.FixtureRequest) -> int:
        return request.param

    @pytest.fixture
    def reader(self, neurons: tuple[Store, list[np.ndarray]], layer: int) -> Iterator[BundleReader]:
        reader = self.open(neurons[0], layer)
        yield reader
        reader.close()

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_fills_the_slots_and_nothing_else(self, neurons, layer: int, reader: BundleReader, data: st.DataObject) -> None:
        store, layers = neurons
        d_ff = store.config.d_ff
        positions = np.asarray(sorted(data.draw(st.sets(st.integers(0, d_ff - 1)))), np.int64)
        num_slots = data.draw(st.integers(max(1, len(positions)), 2 * d_ff))
        slots = np.asarray(data.draw(st.permutations(range(num_slots)))[: len(positions)], np.int64)
        parts = slots_for(store, num_slots)
        expected = [part.copy() for part in parts]
        bundles = layers[layer].view(storage_dtype(store.dtype))
        for place, part in enumerate(expected):
            part[slots] = bundles[positions, place]

        count = reader.read(positions, slots, parts)

        for part, wanted in zip(parts, expected, strict=True):
            assert part.tobytes() == wanted.tobytes()
        assert count.num_bytes == len(positions) * store.bundles.bundle_bytes
        assert (count.reads > 0) == (len(positions) > 0)

    def test_reads_nothing_when_asked_for_nothing(self, neurons, reader: BundleReader) -> None:
        parts = slots_for(neurons[0], 1)
        before = [part.tobytes() for part in parts]
        nothing = np.empty(0, np.int64)
        assert reader.read(nothing, nothing, parts) == ReadCount(0, 0)
        assert [part.tobytes() for part in parts] == before

    def test_whole_layers_match_their_checksums(self, neurons, layer: int, reader: BundleReader) -> None:
        store, _ = neurons
        checksums = read_checksums(store.path, layer)
        assert verify_blocks(reader, checksums, store.bundles.shape, storage_dtype(store.dtype)) == []

    def test_finds_flipped_bytes(self, neurons, layer: int, reader: BundleReader) -> None:
        store, _ = neurons
        rng = np.random.default_rng()
        damaged = np.sort(rng.choice(store.config.d_ff, 2, replace=False))
        offsets = [int(p) * store.bundles.bundle_bytes + int(rng.integers(store.bundles.bundle_bytes)) for p in damaged]
        for offset in offsets:
            flip_byte(shard(store, layer), offset)
        try:
            checksums = read_checksums(store.path, layer)
            found = verify_blocks(reader, checksums, store.bundles.shape, storage_dtype(store.dtype))
        finally:
            for offset in offsets:
                flip_byte(shard(store, layer), offset)
        assert found == damaged.tolist()


class TestZarrReader(BundleReaderContract):
    def open(self, store: Store, layer: int) -> BundleReader:
        return ZarrReader(store.path, layer)


class TestDirectReader(BundleReaderContract):
    def open(self, store: Store, layer: int) -> BundleReader:
        return DirectReader(store.path, layer)


class TestDirectReaderWithChecksums(BundleReaderContract):
    def open(self, store: Store, layer: int) -> BundleReader:
        return DirectReader(store.path, layer, verify=True)

    def test_finds_flipped_bytes(self, neurons, layer: int, reader: BundleReader) -> None:
        store, _ = neurons
        position = int(np.random.default_rng().integers(store.config.d_ff))
        last_byte = (position + 1) * store.bundles.bundle_bytes - 1
        everything = np.arange(store.config.d_ff)
        flip_byte(shard(store, layer), last_byte)
        try:
            with pytest.raises(
                InflashError, match=rf"layer {layer}, neuron at position {position}: expected checksum [0-9a-f]{{8}}"
            ):
                reader.read(everything, everything, slots_for(store, len(everything)))
        finally:
            flip_byte(shard(store, layer), last_byte)
        reader.read(everything, everything, slots_for(store, len(everything)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_neurons(tmp_path / "store", dtype="bfloat16", d_model=256, d_ff=1500)[0]


@pytest.mark.parametrize(
    ("positions", "reads"),
    [
        ([5], 1),
        ([5, 6, 7, 8], 1),
        ([5, 7], 2),
        ([0, 1, 3, 4, 9], 3),
        (range(1500), 5),  # a call takes 1024 segments: two a neuron, and one for what lies before it
        (range(0, 1500, 2), 750),
    ],
)
def test_neighbours_are_one_read(store: Store, positions: list[int], reads: int) -> None:
    assert os.sysconf("SC_IOV_MAX") == 1024
    slots = np.random.default_rng().permutation(len(positions))
    with DirectReader(store.path, 0) as reader:
        count = reader.read(np.asarray(positions), slots, slots_for(store, len(positions)))
    assert count == ReadCount(reads, len(positions) * 1024)


@pytest.fixture
def nobody_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_warned", threading.Event())


def direct_warnings(store: Store, parts: list[np.ndarray], num_readers: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for layer in range(num_readers):
            with DirectReader(store.path, layer) as reader:
                for _ in range(3):
                    reader.read(np.asarray([1, 2]), np.asarray([0, 1]), parts)
    return [str(warning.message) for warning in caught]


@pytest.mark.usefixtures("nobody_warned")
def test_rows_that_are_no_sectors_are_buffered_with_one_warning(tmp_path: Path) -> None:
    store, _ = write_neurons(tmp_path / "store", d_model=96)
    (message,) = direct_warnings(store, slots_for(store, 2))
    assert "direct I/O is refused for rows of 384 bytes" in message
    assert str(shard(store)) in message


@pytest.mark.usefixtures("nobody_warned")
def test_rows_of_whole_sectors_are_read_directly(tmp_path: Path) -> None:
    store, layers = write_neurons(tmp_path / "store", d_model=128)
    if refuses_direct(store):
        pytest.skip(f"the file system under {tmp_path} refuses direct I/O")
    parts = slots_for(store, 2)
    before = read_bytes_of_this_process()
    assert direct_warnings(store, parts) == []
    assert read_bytes_of_this_process() - before >= 2 * 3 * 2 * store.bundles.bundle_bytes
    np.testing.assert_array_equal(parts[1].view(np.uint32), layers[1][1:3, 1].view(np.uint32))


@pytest.mark.usefixtures("nobody_warned")
def test_rows_at_odd_addresses_are_buffered(tmp_path: Path) -> None:
    store, layers = write_neurons(tmp_path / "store", d_model=128)
    room = page_aligned(3, 128, np.dtype(np.float32)).reshape(-1)
    parts = [room[1:257].reshape(2, 128), slots_for(store, 2)[0]]
    assert len(direct_warnings(store, parts)) == 1
    np.testing.assert_array_equal(parts[0].view(np.uint32), layers[1][1:3, 0].view(np.uint32))


def read_bytes_of_this_process() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def test_a_shard_cut_while_in_use_is_named(store: Store) -> None:
    everything = np.arange(1500)
    with DirectReader(store.path, 0) as reader:
        os.truncate(shard(store), 1499 * 1024 + 100)
        with pytest.raises(RunError, match=r"bundles/c/0/0/0: expected \d+ bytes at \d+, found the file's end"):
            reader.read(everything, everything, slots_for(store, 1500))
        reader.read(everything[:1499], everything[:1499], slots_for(store, 1499))


def test_many_threads_share_one_reader(tmp_path: Path) -> None:
    store, layers = write_neurons(tmp_path / "store", dtype="bfloat16", d_model=256, d_ff=512)
    parts = slots_for(store, 512)
    order = np.random.default_rng().permutation(512)
    with DirectReader(store.path, 0) as reader:

        def read(share: np.ndarray) -> None:
            positions = np.sort(share)
            reader.read(positions, positions, parts)

        threads = [threading.Thread(target=read, args=(share,)) for share in np.array_split(order, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    for place, part in enumerate(parts):
        np.testing.assert_array_equal(part, layers[0][:, place].view(np.uint16))


def test_closing_leaves_no_descriptor(store: Store) -> None:
    gc.collect()  # what other tests left to it
    before = sorted(os.listdir("/proc/self/fd"))
    reader = DirectReader(store.path, 0)
    reader.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
