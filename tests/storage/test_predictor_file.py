"""A predictor as one file: it travels bitwise, and nothing damaged, foreign or of another model gets into a store."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import flip_byte, write_neurons

from inflash.errors import InflashError, RunError
from inflash.storage.layout import dtype_of
from inflash.storage.predictor_file import METADATA_KEY, read_predictor_file, write_predictor_file
from inflash.storage.predictor_layout import LOW_RANK, SIGN_BITS, PredictorInfo, predictor_specs
from inflash.storage.predictor_store import add_predictor, load_predictor_layer
from inflash.storage.sign_bits import packed_signs, sign_scale
from inflash.storage.store import Store, open_store
from inflash.tools import export_predictor, import_predictor

D_MODEL, D_FF, NUM_LAYERS = 60, 72, 2  # neither a multiple of what bits are packed in
INFOS = {
    "f32": PredictorInfo(
        kind=LOW_RANK, method="trained", ranks=(8, 3), dtype="float32", between="relu", recall=0.97, tokens=4096
    ),
    "bf16": PredictorInfo(kind=LOW_RANK, method="trained", ranks=(5, 5), dtype="bfloat16", ahead=1),
    "f16": PredictorInfo(kind=LOW_RANK, method="svd", ranks=(4, 4), dtype="float16"),
    "signs": PredictorInfo(kind=SIGN_BITS, method="sign_bits", recall=0.99, tokens=100),
}


def random_layer(store: Store, info: PredictorInfo, layer: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    specs = predictor_specs(store.config, info, layer)
    tensors = {spec.name: rng.standard_normal(spec.shape).astype(dtype_of(spec.dtype)) for spec in specs if spec.dtype != "uint8"}
    if info.kind == SIGN_BITS:
        up = rng.standard_normal((D_FF, D_MODEL))
        tensors |= {"signs": packed_signs(up), "scale": sign_scale(up)}
    return tensors


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With a predictor of each of `INFOS`."""
    path = tmp_path_factory.mktemp("predictors") / "store"
    store, _ = write_neurons(path, d_model=D_MODEL, d_ff=D_FF, num_layers=NUM_LAYERS)
    rng = np.random.default_rng()
    for name, info in INFOS.items():
        store = add_predictor(store, name, info, (random_layer(store, info, layer, rng) for layer in range(NUM_LAYERS)))
    return store


@pytest.fixture
def exported(store: Store, tmp_path: Path) -> Path:
    path = tmp_path / "f32.safetensors"
    write_predictor_file(store, "f32", path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], object]) -> None:
    """Writes the file anew, with its description and tensors changed by `change`; the checksums stay those of before."""
    with safe_open(path, framework="np") as file:
        document = json.loads(file.metadata()[METADATA_KEY])
    tensors = load_file(path)
    change(document, tensors)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(document)})


def import_arguments(store: Store, source: Path, **others: Any) -> Namespace:
    defaults = {"name": None, "threshold": None, "look_ahead": False, "replace": False, "json": False}
    return Namespace(model=store.path, source=source, **{**defaults, **others})


@pytest.mark.parametrize("name", INFOS)
def test_a_predictor_travels_bitwise(store: Store, tmp_path: Path, name: str) -> None:
    path = tmp_path / "shared.safetensors"
    write_predictor_file(store, name, path)
    other, _ = write_neurons(tmp_path / "other", d_model=D_MODEL, d_ff=D_FF, num_layers=NUM_LAYERS)
    info, layers = read_predictor_file(other, path)
    assert info == store.predictors[name] == INFOS[name]
    other = add_predictor(other, "again", info, layers)
    assert other.predictors["again"] == info
    for layer in range(NUM_LAYERS):
        before, after = load_predictor_layer(store, name, layer), load_predictor_layer(other, "again", layer, verify=True)
        assert before.keys() == after.keys()
        for key, values in before.items():
            assert (after[key].dtype, after[key].shape) == (values.dtype, values.shape)
            assert after[key].tobytes() == values.tobytes()


def test_the_file_is_for_sharing_and_alone(exported: Path) -> None:
    """safetensors makes files that only their owner can read, and nothing else may stay beside it."""
    plain = exported.with_name("plain")
    plain.touch()
    assert exported.stat().st_mode == plain.stat().st_mode
    assert sorted(path.name for path in exported.parent.iterdir()) == ["f32.safetensors", "plain"]


@pytest.mark.parametrize("name", ["none", "f32"])
def test_bad_destinations_are_refused(store: Store, tmp_path: Path, name: str) -> None:
    if name == "none":
        with pytest.raises(
            InflashError, match=r"expected one of its predictors \(f32, bf16, f16, signs\), found the name 'none'"
        ):
            write_predictor_file(store, name, tmp_path / "x.safetensors")
        return
    with pytest.raises(InflashError, match=r"ends in \.safetensors"):
        write_predictor_file(store, name, tmp_path / "x.pt")
    with pytest.raises(InflashError, match="folder does not exist"):
        write_predictor_file(store, name, tmp_path / "nowhere" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_nothing_is_overwritten(store: Store, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "here.safetensors"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nothing")
    with pytest.raises(InflashError, match=r"here\.safetensors: already exists"):
        write_predictor_file(store, "f32", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["here.safetensors"]
    assert kind != "file" or path.read_text() == "mine"


def test_a_full_disk_leaves_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inflash.storage.predictor_file.save_file", full)
    with pytest.raises(RunError, match=r"x\.safetensors: cannot be written .*No space left"):
        write_predictor_file(store, "f32", tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_predictor_is_not_exported(tmp_path: Path) -> None:
    store, _ = write_neurons(tmp_path / "store", d_model=D_MODEL, d_ff=D_FF, num_layers=NUM_LAYERS)
    rng, info = np.random.default_rng(), INFOS["f32"]
    store = add_predictor(store, "f32", info, (random_layer(store, info, layer, rng) for layer in range(NUM_LAYERS)))
    data = max(
        (path for path in store.predictor_folder("f32", 1).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    flip_byte(data, 100)
    with pytest.raises(InflashError, match="expected checksum"):
        write_predictor_file(store, "f32", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_flipped_bit_is_found(store: Store, exported: Path) -> None:
    flip_byte(exported, exported.stat().st_size - 1)
    _, layers = read_predictor_file(store, exported)
    with pytest.raises(InflashError, match=r"f32\.safetensors: tensor layer_\d\.\w+: expected checksum \w{8}, found \w{8}"):
        list(layers)


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "text", "absent", "folder"])
def test_damaged_files_are_refused(store: Store, exported: Path, damage: str) -> None:
    whole = exported.read_bytes()
    if damage == "truncated":
        exported.write_bytes(whole[:-10])
    elif damage == "header":
        exported.write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    elif damage in ("empty", "text"):
        exported.write_bytes(b"" if damage == "empty" else b"version https://git-lfs.github.com/spec/v1\n")
    else:
        exported.unlink()
        if damage == "folder":
            exported.mkdir()
    with pytest.raises(InflashError, match=r"f32\.safetensors: (not a whole safetensors file|cannot be read)"):
        read_predictor_file(store, exported)


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"kind": "low_rank"}'])
def test_other_safetensors_are_refused(store: Store, exported: Path, text: str | None) -> None:
    save_file(load_file(exported), exported, metadata=None if text is None else {METADATA_KEY: text})
    said = "without the metadata" if text is None else "expected a predictor for" if "kind" in text else "metadata .* should be"
    with pytest.raises(InflashError, match=rf"f32\.safetensors: .*{said}"):
        read_predictor_file(store, exported)


@pytest.mark.parametrize("sizes", [{"d_model": 64}, {"d_ff": 80}, {"num_layers": 3}])
def test_another_models_predictor_is_refused(exported: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    others: dict[str, Any] = {"d_model": D_MODEL, "d_ff": D_FF, "num_layers": NUM_LAYERS} | sizes
    other, _ = write_neurons(tmp_path / "other", **others)
    wanted = f"{others['num_layers']} layers of d_model {others['d_model']}, d_ff {others['d_ff']}"
    found = f"found one for {NUM_LAYERS} layers of d_model {D_MODEL}, d_ff {D_FF}"
    with pytest.raises(InflashError, match=rf"f32\.safetensors: expected a predictor for {wanted}, .*{found}"):
        read_predictor_file(other, exported)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document, tensors: document.update(kind="forest"), "predictor kind should be"),
        (lambda document, tensors: document.update(colour="red"), "of a newer inflash"),
        (lambda document, tensors: document.pop("method"), "of a newer inflash"),
        (lambda document, tensors: document.update(ranks=7), "of a newer inflash"),
        (lambda document, tensors: document.update(ranks=[8]), "expected 2 ranks"),
        (
            lambda document, tensors: document.update(ranks=[8, 4]),
            r"layer_1\.first: expected float32 \(4, 60\), found float32 \(3",
        ),
        (lambda document, tensors: document.update(dtype="uint8"), "'uint8'"),
        (lambda document, tensors: document.update(dtype="bfloat16"), r"layer_0\.first: expected bfloat16"),
        (lambda document, tensors: document.update(recall="high"), "'high'"),
        (lambda document, tensors: document.update(recall=float("nan")), "found 'trained', 'float32', nan"),
        (lambda document, tensors: document.update(method=3), "a method in words"),
        (lambda document, tensors: document.update(tokens=-1), "a count of tokens"),
        (lambda document, tensors: document.pop("checksums"), "expected a checksum for each of its 8 tensors"),
        (lambda document, tensors: document["checksums"].pop("layer_0.bias"), "expected a checksum for each of its 8 tensors"),
        (lambda document, tensors: tensors.pop("layer_1.bias"), r"layer_1\.bias is missing"),
        (lambda document, tensors: tensors.update({"layer_2.bias": tensors["layer_1.bias"]}), r"layer_2\.bias is unknown"),
    ],
)
def test_contradictions_are_refused(store: Store, exported: Path, change: Callable[..., object], said: str) -> None:
    rewrite(exported, change)
    with pytest.raises(InflashError, match=rf"f32\.safetensors: .*{said}"):
        read_predictor_file(store, exported)


def test_the_commands_take_a_predictor_along(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, _ = write_neurons(tmp_path / "other", d_model=D_MODEL, d_ff=D_FF, num_layers=NUM_LAYERS)
    file = tmp_path / "shared.safetensors"
    capsys.readouterr()
    assert export_predictor.run(Namespace(model=store.path, name="f32", destination=file)) == 0
    assert capsys.readouterr().out == f"{file}: predictor f32, 0.0 MiB\n"
    assert import_predictor.run(import_arguments(other, file)) == 0
    hint = f"judge it with `inflash eval {other.path} --text FILE --predictor shared`"
    assert capsys.readouterr().out == f"added predictor shared: rank 3 to 8, 0.0 MiB; {hint}\n"
    assert open_store(other.path).predictors == {"shared": INFOS["f32"]}
    assert import_predictor.run(import_arguments(other, file, name="lower", threshold=-1.5, json=True)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["name"] == "lower" and document["recall"] is None and document["ranks"] == [8, 3]
    assert document["bytes"] == sum(
        values.nbytes for layer in range(NUM_LAYERS) for values in load_predictor_layer(store, "f32", layer).values()
    )
    for layer in range(NUM_LAYERS):
        tensors = load_predictor_layer(open_store(other.path), "lower", layer, verify=True)
        assert tensors["threshold"].tolist() == [-1.5]
        assert tensors["bias"].tobytes() == load_predictor_layer(store, "f32", layer)["bias"].tobytes()


def test_the_commands_refuse(store: Store, exported: Path, tmp_path: Path) -> None:
    def refused(match: str, source: Path = exported, **others: Any) -> None:
        with pytest.raises(InflashError, match=match):
            import_predictor.run(import_arguments(store, source, **others))

    refused("there is a predictor 'f32' already")
    refused("predictor name: expected letters", name="../x")
    refused("predictor name: expected letters", name="")
    refused("--look-ahead is for folders of PyTorch files", look_ahead=True)
    refused("--threshold: expected a finite number", name="x", threshold=float("nan"))
    refused("expected a folder .* found nothing there", tmp_path / "nothing")
    other = tmp_path / "predictor.pt"
    other.touch()
    refused("expected a folder .* found another file", other)
    assert open_store(store.path).predictors == INFOS


def test_a_predictor_is_replaced_when_asked_for(tmp_path: Path, store: Store) -> None:
    other, _ = write_neurons(tmp_path / "other", d_model=D_MODEL, d_ff=D_FF, num_layers=NUM_LAYERS)
    for name in ("f32", "signs"):
        file = tmp_path / f"{name}.safetensors"
        write_predictor_file(store, name, file)
        import_predictor.run(import_arguments(other, file, name="mine", replace=True))
        assert open_store(other.path).predictors == {"mine": INFOS[name]}
    after = load_predictor_layer(open_store(other.path), "mine", 1, verify=True)
    assert after["signs"].tobytes() == load_predictor_layer(store, "signs", 1)["signs"].tobytes()
