"""Adding predictors to a store that is whole, and reading them back."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import flip_byte, fresh_seed, make_store, write_neurons

from inflash.errors import InflashError
from inflash.storage import predictor_store
from inflash.storage.layout import ATTRIBUTES_KEY, PREDICTORS_FOLDER, dtype_of
from inflash.storage.predictor_layout import BY_NEURON, LOW_RANK, SIGN_BITS, PredictorInfo, predictor_bytes, predictor_specs
from inflash.storage.predictor_store import (
    add_predictor,
    check_name,
    install_predictor,
    load_predictor_layer,
    making_predictor,
    partial_folder,
    save_predictor_layer,
)
from inflash.storage.shard_index import open_raw_array
from inflash.storage.store import Store, open_store
from inflash.storage.verify import find_faults

D_MODEL, D_FF, NUM_LAYERS = 60, 72, 2
INFOS = {
    "f32": PredictorInfo(kind=LOW_RANK, method="trained", ranks=(8, 3), recall=0.97, tokens=4096, between="relu"),
    "bf16": PredictorInfo(kind=LOW_RANK, method="imported", ranks=(1, 5), dtype="bfloat16", ahead=1),
    "signs": PredictorInfo(kind=SIGN_BITS, method="sign_bits"),
}
Layer = dict[str, np.ndarray]


def random_layers(store: Store, info: PredictorInfo) -> list[Layer]:
    """Random bits in every tensor, so that not one of them may be lost."""
    rng = np.random.default_rng(fresh_seed())
    layers = []
    for layer in range(store.config.num_layers):
        tensors = {}
        for spec in predictor_specs(store.config, info, layer):
            tensors[spec.name] = np.frombuffer(rng.bytes(spec.nbytes), dtype_of(spec.dtype)).reshape(spec.shape)
        layers.append(tensors)
    return layers


def same(found: Layer, expected: Layer) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape, found[name].tobytes()) == (values.dtype, values.shape, values.tobytes())
        for name, values in expected.items()
    )


def holds(store: Store, name: str, layers: list[Layer]) -> bool:
    return all(same(load_predictor_layer(store, name, layer, verify=True), tensors) for layer, tensors in enumerate(layers))


def attributes(store: Store) -> dict[str, Any]:
    return json.loads((store.path / "zarr.json").read_bytes())


def entries(store: Store) -> list[str]:
    return sorted(os.listdir(store.path / PREDICTORS_FOLDER))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Without predictors."""
    return write_neurons(tmp_path / "store", d_model=D_MODEL, d_ff=D_FF, num_layers=NUM_LAYERS)[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Layer], list[Layer]]:
    """With a predictor "mine", and what it and another one hold."""
    store, _ = write_neurons(tmp_path_factory.mktemp("one") / "store", d_model=D_MODEL, d_ff=D_FF, num_layers=NUM_LAYERS)
    old, new = random_layers(store, INFOS["f32"]), random_layers(store, INFOS["bf16"])
    return add_predictor(store, "mine", INFOS["f32"], iter(old)), old, new


@pytest.fixture
def with_one(written: tuple[Store, list[Layer], list[Layer]], tmp_path: Path) -> Store:
    """A copy to be changed."""
    shutil.copytree(written[0].path, tmp_path / "copy")
    return open_store(tmp_path / "copy")


def test_predictors_come_back_bitwise_beside_each_other(store: Store) -> None:
    before, files = attributes(store), {path for path in store.path.rglob("*") if path.is_file()}
    untouched = {path: path.read_bytes() for path in files if path != store.path / "zarr.json"}
    layers = {name: random_layers(store, info) for name, info in INFOS.items()}
    for name, info in INFOS.items():
        store = add_predictor(store, name, info, iter(layers[name]))
    assert open_store(store.path) == store
    assert store.predictors == INFOS
    assert list(store.predictors) == list(INFOS)
    assert entries(store) == sorted(INFOS)
    for name, info in INFOS.items():
        assert holds(store, name, layers[name])
        assert predictor_bytes(store.config, info) == sum(array.nbytes for tensors in layers[name] for array in tensors.values())
        for tensors in layers[name]:
            assert all(len(tensors[key]) == D_FF for key in BY_NEURON if key in tensors)
    after = attributes(store)
    after["attributes"][ATTRIBUTES_KEY].pop("predictors")
    before["attributes"][ATTRIBUTES_KEY].pop("predictors")
    assert after == before
    assert {path: path.read_bytes() for path in untouched} == untouched


def test_a_predictor_goes_beside_the_converters(tmp_path: Path) -> None:
    """To a whole model, whose tensors stay sound; damage of either is then found by name."""
    store = make_store(tmp_path, num_hidden_layers=2)
    before = attributes(store)
    layers = random_layers(store, INFOS["signs"])
    store = add_predictor(store, "signs", INFOS["signs"], iter(layers))
    assert list(store.predictors) == ["svd", "signs"]
    after = attributes(store)
    assert after["attributes"][ATTRIBUTES_KEY]["predictors"].pop("signs") == INFOS["signs"].to_json()
    assert after == before
    assert find_faults(store) == []
    for tensor in ("signs/layer_1/0/scale", "svd/layer_0/0/first"):
        array = open_raw_array(store.path / PREDICTORS_FOLDER / tensor)
        flip_byte(array.file, int(array.row_offsets[-1]))
    first, second = find_faults(store)
    assert first.startswith(f"{store.path / PREDICTORS_FOLDER / 'svd/layer_0/0/first'}: expected checksum ")
    assert second.startswith(f"{store.path / PREDICTORS_FOLDER / 'signs/layer_1/0/scale'}: expected checksum ")


@pytest.mark.parametrize("damage", ["layer", "tensor", "checksums"])
def test_what_is_missing_is_a_fault(with_one: Store, damage: str) -> None:
    folder = with_one.predictor_folder("mine", 1)
    path = {"layer": folder, "tensor": folder / "0" / "bias", "checksums": folder / "checksums.json"}[damage]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    faults = [fault for fault in find_faults(with_one) if str(with_one.path / PREDICTORS_FOLDER) in fault]
    (fault,) = faults
    assert fault.startswith(str(folder))


def test_a_description_that_the_tensors_contradict_is_a_fault(with_one: Store) -> None:
    document = attributes(with_one)
    document["attributes"][ATTRIBUTES_KEY]["predictors"]["mine"]["ranks"] = [8, 4]
    (with_one.path / "zarr.json").write_text(json.dumps(document))
    store = open_store(with_one.path)
    load_predictor_layer(store, "mine", 0)
    with pytest.raises(InflashError, match=r"first: expected float32 \(4, 60\), found float32 \(3, 60\)"):
        load_predictor_layer(store, "mine", 1)


def test_a_tensor_of_another_shape_is_refused(store: Store) -> None:
    layers = random_layers(store, INFOS["signs"])
    layers[1]["scale"] = layers[1]["scale"][:-1]
    with pytest.raises(InflashError, match=r"scale: expected shape \(72,\), found \(71,\)"):
        add_predictor(store, "signs", INFOS["signs"], iter(layers))
    assert open_store(store.path).predictors == {}


def test_replacing(with_one: Store, written: tuple[Store, list[Layer], list[Layer]]) -> None:
    _, old, new = written
    assert holds(with_one, "mine", old)
    store = add_predictor(with_one, "mine", INFOS["bf16"], iter(new), replace=True)
    assert store.predictors == {"mine": INFOS["bf16"]}
    assert holds(store, "mine", new)
    assert entries(store) == ["mine"]


@pytest.mark.parametrize("name", ["a", "svd", "Relu_2.5-k", "3", "x.partial"])
def test_names_that_may_be(store: Store, name: str) -> None:
    check_name(store, name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../x", "a b", "a\n", "a\0", "auto", "exact", "none", "-", "-x", "_x", "_.-"]
)
def test_names_that_may_not_be(store: Store, name: str) -> None:
    with pytest.raises(InflashError, match="predictor name: expected letters, digits") as error:
        check_name(store, name, replace=True)
    assert repr(name) in str(error.value)


def test_dense_is_no_predictors_name(store: Store) -> None:
    with pytest.raises(InflashError, match="predictor name"):
        check_name(store, "dense")


def test_taken_names(with_one: Store) -> None:
    check_name(with_one, "another")
    check_name(with_one, "mine", replace=True)
    with pytest.raises(
        InflashError, match=r"copy: there is a predictor 'mine' already; choose another --name, or give --replace"
    ):
        check_name(with_one, "mine")


def test_two_makers_at_once_are_refused(store: Store) -> None:
    with making_predictor(store, "mine") as folder:
        assert folder == partial_folder(store, "mine")
        (folder / "work").touch()
        with pytest.raises(InflashError, match="another process is making the predictor 'mine'"), making_predictor(store, "mine"):
            pytest.fail("two made the same predictor")
        with pytest.raises(InflashError, match="another process is making"):
            add_predictor(store, "mine", INFOS["signs"], iter(random_layers(store, INFOS["signs"])))
        layers = random_layers(store, INFOS["signs"])
        other = add_predictor(store, "other", INFOS["signs"], iter(layers))  # another name is nobody's business
        assert holds(other, "other", layers)
    with making_predictor(store, "mine") as folder:  # the lock is gone
        assert (folder / "work").exists()  # what was done stays for a later run
    assert open_store(store.path).predictors.keys() == {"other"}


def test_a_refused_maker_leaves_the_others_folder(store: Store) -> None:
    """Which is empty at first: without it a third one would not find the lock."""
    with making_predictor(store, "mine") as folder:
        for _ in range(2):
            with pytest.raises(InflashError, match="another process is making"), making_predictor(store, "mine"):
                pytest.fail("two made the same predictor")
        assert folder.exists()


def test_a_maker_that_failed_leaves_no_lock(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), making_predictor(store, "mine"):
        raise ZeroDivisionError
    with making_predictor(store, "mine"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_cannot_be_written_to(store: Store) -> None:
    store.path.chmod(0o500)
    try:
        with pytest.raises(InflashError, match="the store cannot be written to: Permission denied"), making_predictor(store, "x"):
            pytest.fail("made a folder in a store that may not be written to")
    finally:
        store.path.chmod(0o700)


def test_a_name_that_the_disk_refuses(store: Store) -> None:
    with (
        pytest.raises(InflashError, match="the store cannot be written to: File name too long"),
        making_predictor(store, "x" * 300),
    ):
        pytest.fail("no file system has such names")


class Killed(BaseException):
    """What no handler of ours may catch."""


def kill_before(patch: pytest.MonkeyPatch, step: str) -> None:
    """The next call of this step of `install_predictor` does not come back; `step` is "name, attribute or method"."""

    def killed(*_: object, **__: object) -> None:
        raise Killed

    if step in ("rename the layers", "rename the attributes"):
        real, suffix = Path.rename, "layers" if step == "rename the layers" else ""

        def rename(self: Path, target: Path) -> Path:
            if self.name == suffix or (not suffix and self.name.startswith(".zarr.json")):
                raise Killed
            return real(self, target)

        patch.setattr(Path, "rename", rename)
    elif step == "remove the old":
        patch.setattr(predictor_store.shutil, "rmtree", killed)
    elif step == "remove half of the old":
        real_rmtree = shutil.rmtree

        def half(path: Path) -> None:
            real_rmtree(path / "layer_0")
            raise Killed

        patch.setattr(predictor_store.shutil, "rmtree", half)
    else:
        patch.setattr(predictor_store, {"sync": "sync_tree", "forget": "_forget", "name": "_change_attributes"}[step], killed)


@pytest.fixture
def complete(with_one: Store, written: tuple[Store, list[Layer], list[Layer]]) -> Iterator[Path]:
    """The folder of a predictor that is ready to be installed."""
    with making_predictor(with_one, "mine") as folder:
        for layer, tensors in enumerate(written[2]):
            save_predictor_layer(folder / "layers", with_one.config, INFOS["bf16"], layer, tensors)
        yield folder / "layers"


STEPS = ["sync", "forget", "remove the old", "remove half of the old", "rename the layers", "rename the attributes"]


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_while_replacing(
    with_one: Store, complete: Path, written: tuple[Store, list[Layer], list[Layer]], step: str
) -> None:
    """A reader sees the old predictor or none; calling again finishes."""
    _, old, new = written
    before = attributes(with_one)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, step)
        install_predictor(with_one, "mine", INFOS["bf16"], complete, replace=True)
    between = open_store(with_one.path)
    if between.predictors:
        assert between.predictors == {"mine": INFOS["f32"]}
        assert holds(between, "mine", old)
    else:
        assert step not in ("sync", "forget")
    store = install_predictor(between, "mine", INFOS["bf16"], complete, replace=True)
    assert store.predictors == {"mine": INFOS["bf16"]}
    assert holds(store, "mine", new)
    assert not complete.exists()
    after = attributes(store)
    for document in (before, after):
        document["attributes"][ATTRIBUTES_KEY].pop("predictors")
    assert after == before


@pytest.mark.parametrize("step", ["sync", "rename the layers", "name", "rename the attributes"])
def test_a_kill_while_adding(store: Store, step: str) -> None:
    """Nothing was there, so a reader sees nothing until all is there."""
    info = INFOS["signs"]
    layers = random_layers(store, info)
    with making_predictor(store, "mine") as folder:
        for layer, tensors in enumerate(layers):
            save_predictor_layer(folder / "layers", store.config, info, layer, tensors)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_before(patch, step)
            install_predictor(store, "mine", info, folder / "layers")
        assert open_store(store.path) == store
        assert store.predictors == {}
        added = install_predictor(store, "mine", info, folder / "layers")
        again = install_predictor(store, "mine", info, folder / "layers")  # once more does no harm
    assert added.predictors == again.predictors == {"mine": info}
    assert holds(again, "mine", layers)


def test_a_kill_between_layers_is_begun_again(store: Store) -> None:
    layers = random_layers(store, INFOS["f32"])

    def one_layer() -> Iterator[Layer]:
        yield random_layers(store, INFOS["f32"])[0]
        raise Killed

    with pytest.raises(Killed):
        add_predictor(store, "mine", INFOS["f32"], one_layer())
    assert open_store(store.path).predictors == {}
    assert holds(add_predictor(store, "mine", INFOS["f32"], iter(layers)), "mine", layers)
    assert entries(store) == ["mine"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "forest"}, "predictor kind should be low_rank or sign_bits, found 'forest'; upgrade inflash"),
        ({"between": "gelu"}, "predictor: found between 'gelu' and ahead 0; upgrade inflash"),
        ({"ahead": 2}, "ahead 2; upgrade inflash"),
        ({"ranks": [8]}, r"predictor: expected 2 ranks, found \[8\]"),
        ({"ranks": [8, 0]}, r"predictor: expected 2 ranks, found \[8, 0\]"),
        ({"kind": SIGN_BITS}, r"predictor: expected 0 ranks, found \[8, 3\]"),
        ({"dtype": "int4"}, "dtype should be one of .*, found 'int4'"),
        ({"colour": "red"}, "an attribute is damaged .*colour"),
        ({"ranks": 8}, "an attribute is damaged"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_descriptions_that_are_not_understood(with_one: Store, changes: dict[str, Any], said: str) -> None:
    document = attributes(with_one)
    document["attributes"][ATTRIBUTES_KEY]["predictors"]["mine"] |= changes
    (with_one.path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(InflashError, match=said) as error:
        open_store(with_one.path)
    assert str(error.value).startswith(f"{with_one.path}/zarr.json: ")
    assert "\n" not in str(error.value)


def test_older_descriptions_have_the_stores_dtype(with_one: Store) -> None:
    document = attributes(with_one)
    document["attributes"][ATTRIBUTES_KEY]["predictors"]["mine"] = {"kind": LOW_RANK, "method": "svd", "ranks": [8, 3]}
    (with_one.path / "zarr.json").write_text(json.dumps(document))
    found = open_store(with_one.path).predictors["mine"]
    assert found == PredictorInfo(kind=LOW_RANK, method="svd", ranks=(8, 3), dtype="float32")
