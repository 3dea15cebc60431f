import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from opt_checkpoints import VARIANTS, write_opt_checkpoint
from opt_reference import canonical_tensors
from safetensors.numpy import load_file, save_file
from tiny_models import BUFFERED, convert_quietly, fresh_seed, make_store

from inflash.errors import InflashError
from inflash.storage import convert as convert_module
from inflash.storage.checkpoint import open_source
from inflash.storage.convert import bytes_to_write, cast_weights
from inflash.storage.layout import DTYPES, bundles_path, resident_layers
from inflash.storage.predictor_layout import PredictorInfo
from inflash.storage.predictor_store import load_predictor_layer
from inflash.storage.readers import ZarrReader
from inflash.storage.store import Store, open_store
from inflash.storage.verify import find_faults

pytestmark = pytest.mark.filterwarnings(BUFFERED)
TESTS = Path(__file__).parents[1]


def bundles_of(store: Store, layer: int) -> np.ndarray:
    """[F, P, D] through zarr-python."""
    bits = np.dtype(f"u{DTYPES[store.dtype].itemsize}")
    parts = [np.empty((store.config.d_ff, store.config.d_model), bits) for _ in range(2)]
    everything = np.arange(store.config.d_ff)
    ZarrReader(store.path, layer).read(everything, everything, parts)
    return np.stack(parts, axis=1).view(DTYPES[store.dtype])


def assert_holds(store: Store, checkpoint: Path) -> None:
    """Every tensor of the store equals the checkpoint's, cast."""
    with open_source(checkpoint) as source:
        tensors = canonical_tensors(source)
        assert store.config == source.config
    for layer in resident_layers(store.config):
        expected = tensors["embeddings"] if layer is None else tensors["layers"][str(layer)]
        names = set()
        for piece, rows in store.load_resident(layer):
            names.add(piece.spec.name)
            wanted = expected[piece.spec.name][piece.start : piece.stop].astype(DTYPES[piece.spec.dtype])
            assert rows.tobytes() == wanted.tobytes(), (layer, piece.spec.name)
        assert names == expected.keys() - {"up", "down"}
        if layer is not None:
            neurons = np.stack([expected["up"], expected["down"]], axis=1)
            assert bundles_of(store, layer).tobytes() == neurons.astype(DTYPES[store.dtype]).tobytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_shape_of_opt(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "BLOCK_BYTES", 5000)  # many blocks a layer, the last one shorter
    store = make_store(tmp_path, variant=variant, num_hidden_layers=2)
    assert_holds(store, tmp_path / "checkpoint")
    assert find_faults(store) == []
    assert open_store(store.path) == store
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes_are_kept_or_cast(tmp_path: Path, source: str, target: str) -> None:
    write_opt_checkpoint(tmp_path / "checkpoint", dtype=source, seed=fresh_seed(), num_hidden_layers=1, hidden_size=32)
    store = convert_quietly(tmp_path / "checkpoint", tmp_path / "store", dtype=target, predictor_rank=0)
    assert store.dtype == (source if target == "auto" else target)
    assert_holds(store, tmp_path / "checkpoint")


def test_the_predictor_is_of_the_stores_neurons(tmp_path: Path) -> None:
    store = make_store(tmp_path, dtype="bfloat16", predictor_rank=64, num_hidden_layers=2)  # 64 is d_model: nothing is lost
    assert store.predictors == {
        "svd": PredictorInfo(kind="low_rank", method="svd", ranks=(64, 64), dtype="bfloat16", recall=0.99)
    }
    for layer in range(2):
        tensors = load_predictor_layer(store, "svd", layer)
        product = tensors["second"].astype(np.float32) @ tensors["first"].astype(np.float32)
        up = bundles_of(store, layer)[:, 0].astype(np.float32)
        assert np.abs(product - up).max() < 0.03 * np.abs(up).max()  # bfloat16 keeps 8 bits


def test_without_a_predictor(tmp_path: Path) -> None:
    store = make_store(tmp_path, predictor_rank=0, num_hidden_layers=1)
    assert store.predictors == {}
    assert not (store.path / "predictors").exists()


@pytest.mark.parametrize("rank", [-1, 65])
def test_impossible_ranks(tmp_path: Path, rank: int) -> None:
    with pytest.raises(InflashError, match=rf"predictor rank: expected 0 to d_model = 64, found {rank}"):
        make_store(tmp_path, predictor_rank=rank)
    assert not (tmp_path / "store").exists()


def test_progress_adds_up_to_what_was_announced(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path / "checkpoint", seed=fresh_seed(), num_hidden_layers=2)
    written: list[int] = []
    with open_source(tmp_path / "checkpoint") as source:
        announced = bytes_to_write(source, "bfloat16")
    convert_quietly(tmp_path / "checkpoint", tmp_path / "store", dtype="bfloat16", progress=written.append)
    assert sum(written) == announced
    assert len(written) > 10


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    store = make_store(tmp_path, tokenizer=True, num_hidden_layers=1)
    names = {path.name for path in store.tokenizer_folder.iterdir()}
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= names


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("model.decoder.layers.1.fc1.weight", r"layer 1: up projection, neurons 0 to 255: contains NaN or infinite"),
        ("model.decoder.layers.0.self_attn.k_proj.bias", r"layer 0: qkv_bias: contains NaN or infinite"),
        ("model.decoder.embed_tokens.weight", r"tokens: contains NaN or infinite"),
    ],
)
def test_numbers_that_are_none_are_warned_of_by_name(tmp_path: Path, value: float, name: str, named: str) -> None:
    write_opt_checkpoint(tmp_path / "checkpoint", seed=fresh_seed(), num_hidden_layers=2)
    tensors = load_file(tmp_path / "checkpoint/model.safetensors")
    tensors[name].reshape(-1)[11] = value
    save_file(tensors, tmp_path / "checkpoint/model.safetensors")
    with pytest.warns(UserWarning, match=named) as caught:
        convert_quietly(tmp_path / "checkpoint", tmp_path / "store", predictor_rank=0)
    assert sum("NaN" in str(warning.message) for warning in caught) == 1
    assert find_faults(open_store(tmp_path / "store")) == []  # what is there is what was there


def test_a_model_with_nan_converts_with_its_predictor(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path / "checkpoint", seed=fresh_seed(), num_hidden_layers=1)
    tensors = load_file(tmp_path / "checkpoint/model.safetensors")
    tensors["model.decoder.layers.0.fc1.weight"][3, 5] = np.nan
    save_file(tensors, tmp_path / "checkpoint/model.safetensors")
    with pytest.warns(UserWarning, match="contains NaN or infinite weights"):
        convert_quietly(tmp_path / "checkpoint", tmp_path / "store")
    assert find_faults(open_store(tmp_path / "store")) == []


def test_weights_too_large_for_the_dtype_are_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"down: some weights are too large for float16 and became infinite; use another --dtype"
    ):
        cast = cast_weights(np.asarray([1, 1e6], np.float32), "float16", "down")
    np.testing.assert_array_equal(cast, [1, np.inf])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cast = cast_weights(np.asarray([1, 1e6], np.float32), "bfloat16", "down")
    assert cast.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("kind", ["store", "file"])
def test_what_exists_is_left_alone(tmp_path: Path, kind: str) -> None:
    if kind == "store":
        make_store(tmp_path, num_hidden_layers=1)
    else:
        write_opt_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
        (tmp_path / "store").write_text("precious")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InflashError, match="already exists"):
        convert_quietly(tmp_path / "checkpoint", tmp_path / "store")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_missing_folder(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    with pytest.raises(InflashError, match="nowhere: this folder does not exist; make it first"):
        convert_quietly(tmp_path / "checkpoint", tmp_path / "nowhere" / "store")


def test_an_unknown_dtype(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    with pytest.raises(InflashError, match="dtype should be one of bfloat16, float16, float32, found 'int8'"):
        convert_quietly(tmp_path / "checkpoint", tmp_path / "store", dtype="int8")
    assert not (tmp_path / "store").exists()


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_opt_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(InflashError, match=r"the store needs 0\.06 GiB, found 0\.00 GiB free; free some space"):
        convert_quietly(tmp_path / "checkpoint", tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_reads_back_differently_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps something else than what it was given."""
    write = convert_module.StoreWriter.write_neurons

    def write_and_forget(writer, layer, blocks):
        write(writer, layer, blocks)
        with (writer.path / bundles_path(layer) / "c/0/0/0").open("r+b") as stream:
            stream.write(b"oops")

    monkeypatch.setattr(convert_module.StoreWriter, "write_neurons", write_and_forget)
    with pytest.raises(InflashError, match=r"reads back differently \(layer 0, neuron 0: .*\); is the disk sound"):
        make_store(tmp_path, num_hidden_layers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def run_conversion(folder: Path, before: str, **options: str) -> subprocess.CompletedProcess:
    """Converts in a process of its own, after the statements `before`."""
    program = f"""
import re, sys
from pathlib import Path
from inflash.errors import InflashError
from inflash.storage.checkpoint import open_source
from inflash.storage.convert import convert
{before}
with open_source(Path("checkpoint")) as source:
    try:
        convert(source, Path("store"), predictor_rank={options.get("rank", "None")})
    except (OSError, InflashError) as error:
        sys.exit(f"{{type(error).__name__}}: {{error}}")
print("peak KiB", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


# 98,304 bytes is the qkv matrix of a layer, 131,072 the neurons: the limits hit the embeddings, the attention, the neurons.
@pytest.mark.parametrize("limit", [20_000, 60_000, 120_000])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """The limit on a file's size gives the error of a write that fails, without a disk to fill."""
    write_opt_checkpoint(tmp_path / "checkpoint", seed=fresh_seed(), num_hidden_layers=1)
    before = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = run_conversion(tmp_path, before)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(("OSError: ", "RunError: "))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    write_opt_checkpoint(tmp_path / "checkpoint", seed=fresh_seed(), num_hidden_layers=1)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(InflashError, match=r"found 0\.00 GiB free"):
            convert_quietly(tmp_path / "checkpoint", small / "store")
        before = "from inflash.storage import convert as module\nmodule._check_space = lambda destination, needed: None"
        (small / "checkpoint").symlink_to(tmp_path / "checkpoint")
        done = run_conversion(small, before)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(("OSError: ", "RunError: "))
        assert [path.name for path in small.iterdir()] == ["checkpoint"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """Half a GiB of model, the embedding 96 MiB of it; a converter that held it all would need more than is allowed here."""
    width, vocab, layers = 1024, 24576, 8
    config: dict[str, Any] = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": layers, "vocab_size": vocab}
    write_opt_checkpoint(tmp_path / "checkpoint", seed=fresh_seed(), shards=4, **config)
    done = run_conversion(tmp_path, "", rank="0")
    assert done.returncode == 0, done.stderr
    peak = re.search(r"peak KiB (\d+)", done.stdout)
    assert peak is not None
    assert int(peak[1]) << 10 <= (600 << 20) + vocab * width * 4
    store = open_store(tmp_path / "store")
    total = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    assert total > 480 << 20
