import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from tiny_models import BUFFERED, flip_byte, make_store

from inflash.storage.layout import bundles_path, checksums_path, neuron_order_path
from inflash.storage.shard_index import open_raw_array
from inflash.storage.store import Store, open_store
from inflash.storage.verify import find_faults

pytestmark = pytest.mark.filterwarnings(BUFFERED)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("model"), dtype="bfloat16", num_hidden_layers=2)


@pytest.fixture
def store(sound: Store, tmp_path: Path) -> Store:
    """A copy to be damaged."""
    shutil.copytree(sound.path, tmp_path / "store")
    return open_store(tmp_path / "store")


def shard(store: Store, layer: int) -> Path:
    return store.path / bundles_path(layer) / "c/0/0/0"


def test_a_sound_store_has_no_faults(sound: Store) -> None:
    told: list[int] = []
    assert find_faults(sound, progress=told.append) == []
    assert sum(told) == 2 * sound.bundles.layer_bytes


def test_a_flipped_byte_is_told_by_layer_and_neuron(store: Store) -> None:
    rng = np.random.default_rng()
    layer, position = int(rng.integers(2)), int(rng.integers(store.config.d_ff))
    flip_byte(shard(store, layer), position * store.bundles.bundle_bytes + int(rng.integers(store.bundles.bundle_bytes)))
    assert find_faults(store) == [f"layer {layer}, neuron {position}: its bundle does not match its checksum"]


def test_the_neuron_is_told_by_its_name_not_its_place(store: Store) -> None:
    order = np.random.default_rng().permutation(store.config.d_ff).astype(np.int32)
    zarr.open_array(str(store.path / neuron_order_path(1)), mode="r+")[:] = order
    flip_byte(shard(store, 1), 7 * store.bundles.bundle_bytes)
    assert find_faults(store) == [f"layer 1, neuron {order[7]}: its bundle does not match its checksum"]


@pytest.mark.parametrize("most", [1, 3, 10])
def test_stops_after_so_many(store: Store, most: int) -> None:
    for position in range(5):
        flip_byte(shard(store, position % 2), position * store.bundles.bundle_bytes)
    assert len(find_faults(store, most=most)) == min(most, 5)


def test_a_damaged_checksum_is_a_fault(store: Store) -> None:
    flip_byte(store.path / checksums_path(0) / "c/0", 4 * 9)
    assert find_faults(store) == ["layer 0, neuron 9: its bundle does not match its checksum"]


def test_an_order_that_names_a_neuron_twice(store: Store) -> None:
    order = zarr.open_array(str(store.path / neuron_order_path(0)), mode="r+")
    order[3] = 4
    (fault,) = find_faults(store)
    assert fault == f"{store.path / neuron_order_path(0)}: expected each of {store.config.d_ff} neurons once"


@pytest.mark.parametrize(
    "path",
    [
        bundles_path(1) + "/c/0/0/0",
        checksums_path(1) + "/c/0",
        neuron_order_path(1) + "/zarr.json",
        bundles_path(1) + "/zarr.json",
    ],
)
def test_a_missing_file_is_a_fault(store: Store, path: str) -> None:
    (store.path / path).unlink()
    faults = find_faults(store)
    assert faults
    assert all(str(store.path / path).startswith(fault.split(": ")[0]) for fault in faults)


def test_a_cut_shard_is_a_fault(store: Store) -> None:
    file = shard(store, 0)
    file.write_bytes(file.read_bytes()[:-7])
    (fault,) = find_faults(store)
    assert fault.startswith(f"{file}: the shard index is damaged")


@pytest.mark.parametrize("folder", ["resident/embeddings", "resident/layer_1", "predictors/svd/layer_0"])
def test_a_missing_checkpoint_is_a_fault(store: Store, folder: str) -> None:
    shutil.rmtree(store.path / folder)
    (fault,) = find_faults(store)
    assert fault.startswith(f"{store.path / folder}/")


def test_a_layer_of_another_shape_is_a_fault(store: Store, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", dtype="bfloat16", num_hidden_layers=2, ffn_dim=128)
    shutil.rmtree(store.path / "ffn/1")
    shutil.copytree(other.path / "ffn/1", store.path / "ffn/1")
    faults = find_faults(store)
    assert faults[0] == f"{store.path / bundles_path(1)}: expected (256, 2, 64), 256 bytes a neuron, found (128, 2, 64), 256"


@pytest.mark.parametrize("tensor", ["resident/embeddings/0/tokens", "resident/layer_1/0/qkv", "predictors/svd/layer_0/0/second"])
def test_a_flipped_byte_of_what_stays_in_memory(store: Store, tensor: str) -> None:
    array = open_raw_array(store.path / tensor)
    flip_byte(array.file, int(array.row_offsets[np.random.default_rng().integers(len(array.row_offsets))]))
    (fault,) = find_faults(store)
    assert fault.startswith(f"{store.path / tensor}: expected checksum ")
