import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import model_config, write_neurons

from inflash.errors import InflashError
from inflash.storage.layout import ATTRIBUTES_KEY, FORMAT_VERSION, bundles_path, checksums_path, neuron_order_path
from inflash.storage.store import Store, open_store, remove_leftovers, writing_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_neurons(tmp_path / "store", dtype="bfloat16", d_model=32, d_ff=20)[0]


def attributes(store: Store) -> dict[str, Any]:
    return json.loads((store.path / "zarr.json").read_text())["attributes"][ATTRIBUTES_KEY]


def change_attributes(path: Path, **changes: Any) -> None:
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"][ATTRIBUTES_KEY] |= changes
    (path / "zarr.json").write_text(json.dumps(document))


def test_says_what_was_written(store: Store) -> None:
    assert store.config == model_config(d_model=32, d_ff=20)
    assert (store.dtype, store.source, store.predictors) == ("bfloat16", "random bits", {})
    assert store.bundles.shape == (20, 2, 32)
    assert store.bundles.bundle_bytes == 128
    assert attributes(store)["bytes"]["neurons"] == 2 * 20 * 128
    assert attributes(store)["format_version"] == FORMAT_VERSION
    np.testing.assert_array_equal(store.neuron_order(1), np.arange(20))


def test_zarr_reads_it_without_inflash(tmp_path: Path) -> None:
    store, layers = write_neurons(tmp_path / "store", dtype="bfloat16", d_model=32, d_ff=20)
    group = zarr.open_group(str(store.path), mode="r")
    for layer, bundles in enumerate(layers):
        array = group[bundles_path(layer)]
        assert isinstance(array, zarr.Array)
        assert array.dtype == np.uint16
        assert array.attrs["dtype"] == "bfloat16"
        np.testing.assert_array_equal(array[:], bundles.view(np.uint16))
        assert group[checksums_path(layer)].dtype == np.uint32  # pyright: ignore[reportAttributeAccessIssue]
        assert group[neuron_order_path(layer)].dtype == np.int32  # pyright: ignore[reportAttributeAccessIssue]


def test_bundles_begin_where_multiplication_says(tmp_path: Path) -> None:
    """No header, no padding, no checksums between: what direct reads rest on."""
    store, layers = write_neurons(tmp_path / "store", d_model=32, d_ff=20)
    content = (store.path / bundles_path(0) / "c/0/0/0").read_bytes()
    assert content[: store.bundles.layer_bytes] == layers[0].tobytes()
    assert len(content) == store.bundles.layer_bytes + 20 * 16 + 4


def test_a_newer_format_is_refused(store: Store) -> None:
    change_attributes(store.path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(InflashError, match=rf"expected format version {FORMAT_VERSION} or older, found {FORMAT_VERSION + 1}"):
        open_store(store.path)


def test_a_missing_store(tmp_path: Path) -> None:
    with pytest.raises(
        InflashError, match=r"nothing: expected an inflash store, found no store; make one with `inflash convert SRC DST`"
    ):
        open_store(tmp_path / "nothing")


def test_a_checkpoint_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InflashError, match=rf"found a Hugging Face checkpoint; make one with `inflash convert {tmp_path} DST`"):
        open_store(tmp_path)


def test_a_file_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(InflashError, match="expected a store's folder, found a file"):
        open_store(tmp_path / "store")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"null", b"\xff\xfe", b'{"attributes": 7}', b'{"attributes": {"inflash": []}}']
)
def test_other_content_is_not_a_store(store: Store, content: bytes) -> None:
    (store.path / "zarr.json").write_bytes(content)
    with pytest.raises(InflashError, match=r"zarr\.json: expected the attributes of an inflash store, found other content"):
        open_store(store.path)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers()), st.dictionaries(st.text(), st.none())
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["format_version", "config", "dtype", "source", "predictors"]), junk=JUNK, missing=st.booleans())
def test_damaged_attributes_are_refused_in_words(store: Store, name: str, junk: Any, missing: bool) -> None:
    file = store.path / "zarr.json"
    whole = file.read_text()
    document = json.loads(whole)
    if missing:
        del document["attributes"][ATTRIBUTES_KEY][name]
    else:
        document["attributes"][ATTRIBUTES_KEY][name] = junk
    file.write_text(json.dumps(document))
    try:
        found = open_store(store.path)
    except InflashError:
        pass
    else:  # what is taken has to have made sense
        assert found.config == store.config
        assert found.dtype == store.dtype
        assert isinstance(found.predictors, dict)
    finally:
        file.write_text(whole)


@pytest.mark.parametrize("name", ["d_model", "family"])
def test_a_missing_key_of_the_config(store: Store, name: str) -> None:
    config = attributes(store)["config"]
    del config[name]
    change_attributes(store.path, config=config)
    with pytest.raises(InflashError, match=name):
        open_store(store.path)


def test_an_unknown_key_of_the_config(store: Store) -> None:
    change_attributes(store.path, config={**attributes(store)["config"], "rotary_dim": 64})
    with pytest.raises(InflashError, match=r"unknown keys \['rotary_dim'\]"):
        open_store(store.path)


def test_nothing_is_left_of_a_store_that_failed(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        writing_store(tmp_path / "store", model_config(), "float32", "test") as writer,
    ):
        writer.write_neurons(0, iter([np.zeros((128, 2, 64), np.float32)]))
        assert writer.path.name.startswith(".store.partial-")
        assert list(tmp_path.iterdir()) == [writer.path]
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [127, 129])
def test_a_layer_of_another_size_is_refused(tmp_path: Path, rows: int) -> None:
    with (
        pytest.raises(InflashError, match=rf"ffn/1/bundles: expected 65536 bytes of neurons, found {rows * 512}"),
        writing_store(tmp_path / "store", model_config(), "float32", "test") as writer,
    ):
        writer.write_neurons(1, iter([np.zeros((rows, 2, 64), np.float32)]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("precious")], ids=["folder", "file"])
def test_what_exists_is_not_overwritten(tmp_path: Path, make) -> None:
    make(tmp_path / "store")
    with (
        pytest.raises(InflashError, match="store: already exists; remove it or choose another name"),
        writing_store(tmp_path / "store", model_config(), "float32", "test"),
    ):
        raise AssertionError("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with (
        pytest.raises(InflashError, match="nowhere: this folder does not exist"),
        writing_store(tmp_path / "nowhere" / "store", model_config(), "float32", "test"),
    ):
        raise AssertionError("the block must not run")


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """A conversion that was killed cannot clean up after itself; the next one to the same place does."""
    program = f"""
import os, signal
from pathlib import Path
from tiny_models import model_config
from inflash.storage.store import writing_store
with writing_store(Path({str(tmp_path)!r}) / "store", model_config(), "float32", "test"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".store.partial-")
    others = [f".store.partial-{os.getpid()}", ".other.partial-999999999", ".store.partial-x", "store.partial-1"]
    for name in others:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path / "store")
    assert {path.name for path in tmp_path.iterdir()} == set(others)
    for name in (".store.split-999999999", f".store.split-{os.getpid()}"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path / "store", "split")
    assert {path.name for path in tmp_path.iterdir()} == {*others, f".store.split-{os.getpid()}"}
