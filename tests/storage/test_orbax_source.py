import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from opt_checkpoints import VARIANTS, write_opt_checkpoint
from opt_reference import canonical_tensors

from inflash.errors import InflashError
from inflash.storage import orbax_source
from inflash.storage.checkpoint import CheckpointSource, open_source
from inflash.storage.orbax_source import save_orbax_source


def write_both(folder: Path, **options) -> tuple[CheckpointSource, Path]:
    """A Hugging Face checkpoint, opened, and the path of an Orbax checkpoint of the same tensors."""
    write_opt_checkpoint(folder / "huggingface", seed=int(np.random.default_rng().integers(1 << 31)), **options)
    source = open_source(folder / "huggingface")
    save_orbax_source(folder / "orbax", source.config, source.dtype, canonical_tensors(source))
    return source, folder / "orbax"


def assert_same(ours: CheckpointSource, expected: CheckpointSource) -> None:
    assert (ours.config, ours.dtype) == (expected.config, expected.dtype)
    first, second = canonical_tensors(ours), canonical_tensors(expected)
    flat = {("embeddings", name): tensor for name, tensor in second["embeddings"].items()}
    flat |= {(layer, name): tensor for layer, leaves in second["layers"].items() for name, tensor in leaves.items()}
    for (place, name), tensor in flat.items():
        found = first["embeddings"][name] if place == "embeddings" else first["layers"][place][name]
        assert found.dtype == tensor.dtype, (place, name)
        assert found.tobytes() == tensor.tobytes(), (place, name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_hugging_face_source(tmp_path: Path, variant: str, dtype: str) -> None:
    source, path = write_both(tmp_path, variant=variant, dtype=dtype)
    with open_source(path) as ours:
        assert_same(ours, source)
        assert ours.tokenizer_folder == path


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("use_zarr3", [True, False])
def test_reads_every_storage_of_orbax(tmp_path: Path, use_ocdbt: bool, use_zarr3: bool) -> None:
    source, path = write_both(tmp_path, dtype="bfloat16")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path / "params", args=ocp.args.PyTreeSave(canonical_tensors(source)), force=True)
    with open_source(path) as ours:
        assert_same(ours, source)


def test_reads_what_the_standard_checkpointer_saves_of_jax_arrays(tmp_path: Path) -> None:
    import jax

    source, path = write_both(tmp_path, variant="350m", dtype="float16")
    tree = jax.tree.map(jax.numpy.asarray, canonical_tensors(source))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", tree, force=True)
    with open_source(path) as ours:
        assert_same(ours, source)


@pytest.mark.parametrize("block_bytes", [1 << 10, 5000, 1 << 20])
def test_neuron_rows_of_any_range(tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_source, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(orbax_source, "_CHUNK_BYTES", 3000)
    source, path = write_both(tmp_path, variant="odd")
    rng = np.random.default_rng()
    with open_source(path) as ours:
        for _ in range(5):
            start, stop = sorted(rng.integers(0, 201, 2).tolist())
            np.testing.assert_array_equal(ours.neuron_rows(1, start, stop), source.neuron_rows(1, start, stop))


def test_reading_imports_neither_jax_nor_orbax(tmp_path: Path) -> None:
    _, path = write_both(tmp_path)
    program = f"""
import sys
from pathlib import Path
from inflash.storage.checkpoint import open_source
with open_source(Path({str(path)!r})) as source:
    source.neuron_rows(0, 1, 3)
print(sorted({{"jax", "orbax", "orbax.checkpoint", "torch"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def save_changed(folder: Path, change) -> None:
    write_opt_checkpoint(folder / "huggingface")
    with open_source(folder / "huggingface") as source:
        tree = canonical_tensors(source)
        change(tree)
        save_orbax_source(folder / "orbax", source.config, source.dtype, tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["layers"]["1"].pop("qkv"), r"differing in \['layers\.1\.qkv'\]"),
        (lambda tree: tree.pop("embeddings"), r"differing in \['embeddings\.final_norm_bias'"),
        (lambda tree: tree["layers"].pop("2"), r"differing in \['layers\.2\.attention_norm_bias'"),
        (lambda tree: tree["embeddings"].update(extra=np.zeros(3, np.float32)), r"differing in \['embeddings\.extra'\]"),
        (
            lambda tree: tree["layers"]["0"].update(down=tree["layers"]["0"]["down"].T),
            r"layers\.0\.down should have shape \(256, 64\) by its config, found \(64, 256\)",
        ),
        (lambda tree: tree["layers"]["0"].update(up=np.zeros((256, 64), np.int8)), r"layers\.0\.up should be one of"),
        (lambda tree: tree["layers"]["0"].update(up=np.zeros((256, 64), np.float16)), r"layers\.0\.up should be float32"),
    ],
)
def test_saving_a_wrong_tree_writes_nothing(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(InflashError, match=message):
        save_changed(tmp_path, change)
    assert not (tmp_path / "orbax").exists()


def test_saving_over_something(tmp_path: Path) -> None:
    source, path = write_both(tmp_path)
    with pytest.raises(InflashError, match="already exists"):
        save_orbax_source(path, source.config, source.dtype, canonical_tensors(source))


def test_config_that_contradicts_the_tensors(tmp_path: Path) -> None:
    _, path = write_both(tmp_path)
    manifest = path / "inflash.json"
    document = json.loads(manifest.read_text())
    for key, value, message in [
        ("d_ff", 255, r"layers\.0\.up_bias should have shape \(255,\) by its config, found \(256,\)"),
        ("num_layers", 4, r"tensor layers\.3\.attention_norm_scale cannot be opened"),
        ("tied_head", False, r"tensor embeddings\.head cannot be opened"),
        ("colour", "red", r"inflash\.json: model config: unknown keys \['colour'\]"),
        ("num_heads", 7, r"inflash\.json: .*multiple of num_heads"),
    ]:
        manifest.write_text(json.dumps({**document, "config": {**document["config"], key: value}}))
        with pytest.raises(InflashError, match=message):
            open_source(path)
    manifest.write_text(json.dumps({**document, "dtype": "bfloat16"}))
    with pytest.raises(InflashError, match=r"layers\.0\.up should be bfloat16, as its checkpoint's dtype says, found float32"):
        open_source(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": 3, "dtype": "float32"}', '{"config": {}, "dtype": ["x"]}'])
def test_malformed_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "inflash.json").write_text(text)
    with pytest.raises(InflashError, match=r"inflash\.json: "):
        open_source(tmp_path)


def test_missing_params(tmp_path: Path) -> None:
    _, path = write_both(tmp_path)
    (path / "params").rename(path / "parameters")
    with pytest.raises(InflashError, match="params: expected an Orbax PyTree checkpoint"):
        open_source(path)


def test_truncated_data_is_an_error(tmp_path: Path) -> None:
    _, path = write_both(tmp_path)
    for file in (path / "params").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(InflashError, match=r"params.*(cannot be opened|cannot be read)"), open_source(path) as ours:
        canonical_tensors(ours)
