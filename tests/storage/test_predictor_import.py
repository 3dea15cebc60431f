"""Predictors of PowerInfer and Deja Vu: the masks are those of the module that was trained, and nothing in a pickle runs.

Most of it needs no PyTorch: the same tensors in safetensors, under the names of `.pt` files, stand for it.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import fresh_seed, make_store, write_neurons

from inflash.errors import InflashError
from inflash.pipeline.predictors import load_layer
from inflash.storage.predictor_import import check_threshold, read_torch_predictor
from inflash.storage.predictor_layout import LOW_RANK, PredictorInfo
from inflash.storage.predictor_store import add_predictor, load_predictor_layer
from inflash.storage.store import Store, open_store
from inflash.storage.weight_files import SafetensorsFile
from inflash.tools import import_predictor

D_MODEL, D_FF, NUM_LAYERS = 64, 256, 2
RANKS = (40, 33)  # with few, ReLU would now and then let nothing through: every score would be the threshold itself
POWER_INFER, DEJA_VU = ("fc1.weight", "fc2.weight"), ("0.weight", "1.weight")
BETWEEN = {POWER_INFER: "relu", DEJA_VU: "none"}
FORMATS = pytest.mark.parametrize("keys", [POWER_INFER, DEJA_VU], ids=["PowerInfer", "Deja Vu"])

Matrices = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("import")
    return make_store(folder, predictor_rank=0, hidden_size=D_MODEL, ffn_dim=D_FF, num_hidden_layers=NUM_LAYERS)


def random_layers(ranks: tuple[int, ...] = RANKS) -> list[Matrices]:
    """[R, D] and [F, R] f32 for each layer, of such a size that scores are near 1."""
    rng = np.random.default_rng(fresh_seed())
    return [
        (
            (rng.standard_normal((rank, D_MODEL)) / D_MODEL**0.5).astype(np.float32),
            (rng.standard_normal((D_FF, rank)) / rank**0.5).astype(np.float32),
        )
        for rank in ranks
    ]


def write_layers(folder: Path, keys: tuple[str, str], layers: list[Matrices], name: str = "model_{}.pt") -> list[Matrices]:
    """Safetensors that pretend to be PyTorch's files."""
    folder.mkdir(exist_ok=True)
    for layer, matrices in enumerate(layers):
        save_file(dict(zip(keys, matrices, strict=True)), folder / name.format(layer))
    return layers


def read(store: Store, folder: Path, **options: Any) -> tuple[PredictorInfo, list[dict[str, np.ndarray]]]:
    info, layers = read_torch_predictor(store, folder, open_file=SafetensorsFile, **options)
    return info, list(layers)


def refused(store: Store, folder: Path, match: str) -> None:
    with pytest.raises(InflashError, match=match):
        read(store, folder)


def assert_masks(store: Store, name: str, layer: int, h: np.ndarray, scores: np.ndarray, threshold: float) -> None:
    """The masks for h [T, D] are those of the scores [T, F], but for scores so near the threshold that rounding decides."""
    clear = np.abs(scores - threshold) >= 1e-4
    assert (~clear).mean() < 0.01
    wanted = scores > threshold
    assert 0.05 < wanted.mean() < 0.95
    for rows in (slice(0, 3), slice(None)):  # few rows go another way than many
        found = np.asarray(load_layer(store, name, layer).predict(jnp.asarray(h[rows])))
        assert np.array_equal(found[clear[rows]], wanted[rows][clear[rows]])


@FORMATS
def test_tensors_and_description(store: Store, tmp_path: Path, keys: tuple[str, str]) -> None:
    layers = write_layers(tmp_path, keys, random_layers())
    info, tensors = read(store, tmp_path, ahead=1)
    assert info == PredictorInfo(kind=LOW_RANK, method="imported", ranks=RANKS, between=BETWEEN[keys], ahead=1)
    for (first, second), found in zip(layers, tensors, strict=True):
        assert found["first"].tobytes() == first.tobytes() and found["second"].tobytes() == second.tobytes()
        assert found["bias"].dtype == np.float32 and not found["bias"].any() and found["bias"].shape == (D_FF,)
        assert found["threshold"].dtype == np.float32 and found["threshold"].tolist() == [0.0]


@FORMATS
def test_masks_are_those_of_the_formula(store: Store, tmp_path: Path, keys: tuple[str, str]) -> None:
    layers = write_layers(tmp_path, keys, random_layers())
    name = f"formula-{BETWEEN[keys]}"
    added = add_predictor(store, name, *read_torch_predictor(store, tmp_path, open_file=SafetensorsFile))
    h = np.random.default_rng(fresh_seed()).standard_normal((40, D_MODEL)).astype(np.float32)
    for layer, (first, second) in enumerate(layers):
        coordinates = h.astype(np.float64) @ first.T
        scores = (np.maximum(coordinates, 0) if keys == POWER_INFER else coordinates) @ second.T
        assert_masks(added, name, layer, h, scores, 0.0)


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        ((np.float32, np.float32), "float32"),
        ((ml_dtypes.bfloat16, ml_dtypes.bfloat16), "bfloat16"),
        ((np.float16, np.float16), "float32"),
        ((ml_dtypes.bfloat16, np.float32), "float32"),
        ((ml_dtypes.bfloat16, np.float16), "float32"),
    ],
)
def test_dtypes_widen_without_loss(store: Store, tmp_path: Path, dtypes: tuple[type, type], stored: str) -> None:
    layers = [(a.astype(dtype), b.astype(dtype)) for (a, b), dtype in zip(random_layers(), dtypes, strict=True)]
    write_layers(tmp_path, POWER_INFER, layers)
    info, tensors = read(store, tmp_path)
    assert info.dtype == stored
    for (first, second), found in zip(layers, tensors, strict=True):
        for values, matrix in ((found["first"], first), (found["second"], second)):
            assert values.dtype.name == stored
            assert np.array_equal(values.astype(np.float64), matrix.astype(np.float64))


@pytest.mark.parametrize(
    "name",
    [
        "model_{}.pt",
        "layer_{}.pth",
        "mlp_layer{}.pt",
        "opt_layer{}_lr0.001.pt",
        "c4_mlp_layer{}_-0.9912-1204.pt",
        "Model-7B_Layer.{}.bin",
    ],
)
def test_names_of_files(store: Store, tmp_path: Path, name: str) -> None:
    layers = write_layers(tmp_path, DEJA_VU, random_layers(), name)
    for other in ("optimizer.pt", "model_9.txt", "README.md"):
        (tmp_path / other).write_text("of no interest")
    _, tensors = read(store, tmp_path)
    assert [found["first"].tobytes() for found in tensors] == [first.tobytes() for first, _ in layers]


def test_ten_layers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    store, _ = write_neurons(tmp_path / "store", d_model=D_MODEL, d_ff=D_FF, num_layers=11)
    write_layers(tmp_path / "predictor", DEJA_VU, random_layers(tuple(range(1, 12))))
    info, _ = read(store, tmp_path / "predictor")
    assert info.ranks == tuple(range(1, 12))


@pytest.mark.parametrize(
    ("config", "threshold"), [({"sparse_threshold": 0.25}, 0.25), ({"sparse_threshold": None}, 0.0), ({}, 0.0)]
)
def test_the_threshold_of_power_infer(store: Store, tmp_path: Path, config: dict[str, Any], threshold: float) -> None:
    write_layers(tmp_path, POWER_INFER, random_layers())
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, tensors = read(store, tmp_path)
    assert [found["threshold"].tolist() for found in tensors] == [[threshold]] * NUM_LAYERS


@pytest.mark.parametrize(
    "text", ['{"sparse_threshold": "0"}', '{"sparse_threshold": true}', '{"sparse_threshold": NaN}', "[]", "{"]
)
def test_a_bad_config_is_refused(store: Store, tmp_path: Path, text: str) -> None:
    write_layers(tmp_path, POWER_INFER, random_layers())
    (tmp_path / "config.json").write_text(text)
    refused(store, tmp_path, r"config\.json: (sparse_threshold: expected a finite number|expected)")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e39, None, True, "1"])
def test_thresholds_are_finite_numbers(value: object) -> None:
    with pytest.raises(InflashError, match="--threshold: expected a finite number"):
        check_threshold(value, "--threshold")
    assert check_threshold(-3, "--threshold") == -3.0


def test_wrong_files_are_refused(store: Store, tmp_path: Path) -> None:
    refused(store, tmp_path / "nowhere", "expected a folder with one file a layer, .* found no folder")
    refused(store, tmp_path, "expected one file a layer, .* found none")
    layers = random_layers()
    write_layers(tmp_path, POWER_INFER, layers[:1])
    refused(store, tmp_path, "each of the model's layers 0 to 1, found none for layer 1; ")
    write_layers(tmp_path, POWER_INFER, layers, "model_{}0.pt")  # layers 0 and 10; layer 0 is there twice
    refused(store, tmp_path, r"found model_0\.pt and model_00\.pt for layer 0")
    (tmp_path / "model_00.pt").unlink()
    refused(store, tmp_path, "found none for layer 1 and one for layer 10; ")
    (tmp_path / "model_10.pt").rename(tmp_path / "layer1_of_layer2.pt")
    refused(store, tmp_path, "expected one number after 'layer', found 1, 2; ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda first, second: (first[:, 1:], second), r"fc1\.weight: expected shape \(rank, 64\), .* found \(33, 63\)"),
        (lambda first, second: (first[0], second), r"fc1\.weight: expected shape \(rank, 64\), .* found \(64,\)"),
        (lambda first, second: (first[:0], second[:, :0]), r"fc1\.weight: expected shape \(rank, 64\), .* found \(0, 64\)"),
        (lambda first, second: (first, second[1:]), r"fc2\.weight: expected shape \(256, 33\), d_ff .* found \(255, 33\)"),
        (
            lambda first, second: (first, second[:, 1:]),
            r"fc2\.weight: expected shape \(256, 33\), .* of rank 33, found \(256, 32\)",
        ),
        (lambda first, second: (first, second.T), r"fc2\.weight: expected shape \(256, 33\), .* found \(33, 256\)"),
        (
            lambda first, second: (first.astype(np.float64), second),
            r"fc1\.weight: expected .*float32, found F64; save it as float32",
        ),
        (lambda first, second: (first, (second * 100).astype(np.int8)), r"fc2\.weight: expected .*float32, found I8"),
        (lambda first, second: (first * np.float32(np.nan), second), r"fc1\.weight: expected finite weights"),
        (lambda first, second: (first, second / np.float32(0)), r"fc2\.weight: expected finite weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
def test_wrong_tensors_are_refused(store: Store, tmp_path: Path, change: Callable[..., Matrices], said: str) -> None:
    layers = random_layers()
    first, second = change(*layers[1])
    write_layers(tmp_path, POWER_INFER, [layers[0], (np.ascontiguousarray(first), np.ascontiguousarray(second))])
    refused(store, tmp_path, rf"model_1\.pt: {said}")


def test_unknown_and_mixed_formats_are_refused(store: Store, tmp_path: Path) -> None:
    layers = write_layers(tmp_path, POWER_INFER, random_layers())
    save_file(dict(zip(DEJA_VU, layers[1], strict=True)), tmp_path / "model_1.pt")
    refused(store, tmp_path, r"model_1\.pt: expected PowerInfer's format, as in model_0\.pt, found Deja Vu's")
    save_file({**dict(zip(POWER_INFER, layers[1], strict=True)), "fc1.bias": np.zeros(33)}, tmp_path / "model_1.pt")
    refused(store, tmp_path, r"model_1\.pt: expected the tensors fc1\.weight .* found fc1\.bias, fc1\.weight, fc2\.weight; ")
    save_file({}, tmp_path / "model_1.pt")
    refused(store, tmp_path, r"model_1\.pt: expected the tensors .* found none; ")


def test_one_layer_is_read_at_a_time(store: Store, tmp_path: Path) -> None:
    write_layers(tmp_path, POWER_INFER, random_layers())
    reads: list[str] = []

    class Counted(SafetensorsFile):
        def read(self, name: str, selection: tuple[slice, ...]) -> np.ndarray:
            reads.append(self.path.name)
            return super().read(name, selection)

    _, layers = read_torch_predictor(store, tmp_path, open_file=Counted)
    assert reads == []
    next(layers)
    assert reads == ["model_0.pt"] * 2


def test_without_torch_it_tells_what_to_install(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layers(tmp_path, POWER_INFER, random_layers())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InflashError, match=r"model_0\.pt: .*pip install 'inflash\[torch\]'"):
        read_torch_predictor(store, tmp_path)


# From here on with PyTorch itself.


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is an optional extra")


def torch_module(torch: Any, keys: tuple[str, str], rank: int) -> Any:
    """The module that was trained, as its project defines it."""
    parts = {
        "fc1": torch.nn.Linear(D_MODEL, rank, bias=False),
        "relu": torch.nn.ReLU(),
        "fc2": torch.nn.Linear(rank, D_FF, bias=False),
    }
    if keys == DEJA_VU:
        return torch.nn.Sequential(parts["fc1"], parts["fc2"])
    module = torch.nn.Sequential()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


def import_arguments(store: Store, source: Path, **others: Any) -> Namespace:
    defaults = {"name": None, "threshold": None, "look_ahead": False, "replace": True, "json": True}
    return Namespace(model=store.path, source=source, **{**defaults, **others})


@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@FORMATS
def test_masks_are_those_of_torch(
    torch: Any, store: Store, tmp_path: Path, keys: tuple[str, str], dtype: str, threshold: float | None
) -> None:
    torch.manual_seed(fresh_seed())
    modules = [torch_module(torch, keys, rank).to(getattr(torch, dtype)) for rank in RANKS]
    for layer, module in enumerate(modules):
        torch.save(module.state_dict(), tmp_path / f"model_{layer}.pt")
    if threshold is not None and keys == POWER_INFER:
        (tmp_path / "config.json").write_text(json.dumps({"sparse_threshold": threshold}))
    override = threshold if keys == DEJA_VU else None
    assert import_predictor.run(import_arguments(store, tmp_path, name="torch", threshold=override, look_ahead=True)) == 0
    added = open_store(store.path)
    assert added.predictors["torch"].ahead == 1 and added.predictors["torch"].dtype == "float32"
    h = torch.randn(40, D_MODEL)
    for layer, module in enumerate(modules):
        with torch.no_grad():
            scores = module.float()(h)
        if keys == DEJA_VU and threshold is None:
            clear = scores.abs() >= 1e-4
            assert torch.equal((scores.sigmoid() >= 0.5)[clear], (scores > 0)[clear])
        assert_masks(added, "torch", layer, h.numpy(), scores.double().numpy(), threshold or 0.0)


def test_bfloat16_of_torch_keeps_its_bits(torch: Any, store: Store, tmp_path: Path) -> None:
    modules = [torch_module(torch, POWER_INFER, rank).to(torch.bfloat16) for rank in RANKS]
    for layer, module in enumerate(modules):
        torch.save(module.state_dict(), tmp_path / f"model_{layer}.pt")
    added = add_predictor(store, "bits", *read_torch_predictor(store, tmp_path))
    assert added.predictors["bits"].dtype == "bfloat16"
    for layer, module in enumerate(modules):
        tensors = load_predictor_layer(added, "bits", layer, verify=True)
        for key, linear in (("first", module.fc1), ("second", module.fc2)):
            assert tensors[key].tobytes() == linear.weight.detach().view(torch.int16).numpy().tobytes()


class RunsWhenUnpickled:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self._folder),)


@pytest.mark.parametrize("with_tensors", [True, False])
def test_code_in_a_pickle_does_not_run(torch: Any, store: Store, tmp_path: Path, with_tensors: bool) -> None:
    predictor, made = tmp_path / "predictor", tmp_path / "made"
    predictor.mkdir()
    for layer, (first, second) in enumerate(random_layers()):
        state: dict[str, Any] = {"fc1.weight": torch.from_numpy(first), "fc2.weight": torch.from_numpy(second)}
        if layer == 1:
            state = {**state, "extra": RunsWhenUnpickled(made)} if with_tensors else {"fc1.weight": RunsWhenUnpickled(made)}
        torch.save(state, predictor / f"model_{layer}.pt")
    with pytest.raises(InflashError, match=r"model_1\.pt: PyTorch cannot load it as a file of tensors"):
        import_predictor.run(import_arguments(store, predictor, name="evil"))
    assert not made.exists()
    assert "evil" not in open_store(store.path).predictors
    torch.load(predictor / "model_1.pt", weights_only=False)  # it would have
    assert made.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "nested"])
def test_damaged_files_of_torch_are_refused(torch: Any, store: Store, tmp_path: Path, damage: str) -> None:
    for layer, (first, second) in enumerate(random_layers()):
        state = {"0.weight": torch.from_numpy(first), "1.weight": torch.from_numpy(second)}
        torch.save({"state_dict": state} if damage == "nested" else state, tmp_path / f"model_{layer}.pt")
    file = tmp_path / "model_1.pt"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage != "nested":
        file.write_bytes(b"" if damage == "empty" else b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InflashError, match=r"model_[01]\.pt: (PyTorch cannot load it|expected the tensors .* found none)"):
        read_torch_predictor(store, tmp_path)
