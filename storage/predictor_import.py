"""Predictors that other projects trained with PyTorch: a folder with a state dict a layer.

Axes: F d_ff, D d_model, R rank.

Both formats are two linears without biases, told apart by the tensors' names:

- PowerInfer (arXiv:2312.12456): `fc1.weight` [R, D], ReLU, `fc2.weight` [F, R]; a `config.json` may give the `sparse_threshold`.
- Deja Vu (arXiv:2310.17157): `0.weight` [R, D], nothing, `1.weight` [F, R]; what a sigmoid puts at a half or more, which is a score of
  0 or more, is active.

Both also name a neuron whose score is the threshold itself, which inflash does not. Trained scores are so for neurons of zeros, and for
an input of which PowerInfer's ReLU lets nothing through.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InflashError
from .json_files import read_json_object
from .layout import DTYPES, dtype_of
from .model_config import ModelConfig
from .predictor_layout import LOW_RANK, PredictorInfo
from .store import Store
from .torch_file import TorchFile
from .weight_files import WeightFile

_SUFFIXES = (".pt", ".pth", ".bin")
_EXAMPLES = "model_0.pt or mlp_layer0.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """Who writes a file so, its two matrices' names, and what stands between them."""

    owner: str
    first: str
    second: str
    between: str


_POWER_INFER = _Format(owner="PowerInfer", first="fc1.weight", second="fc2.weight", between="relu")
_DEJA_VU = _Format(owner="Deja Vu", first="0.weight", second="1.weight", between="none")
_FORMATS = (_POWER_INFER, _DEJA_VU)


def read_torch_predictor(
    store: Store, folder: Path, *, ahead: int = 0, open_file: Callable[[Path], WeightFile] = TorchFile
) -> tuple[PredictorInfo, Iterator[dict[str, np.ndarray]]]:
    """Opens a predictor of PowerInfer's or Deja Vu's for the store's model.

    Args:
      store: whose model it was trained for.
      folder: with one file a layer, whose name has the layer's number after "layer" or "model".
      ahead: 1 where it was trained on the FFN input of the layer before; the files do not say.
      open_file: reads a file without running anything in it.

    Returns:
      The description, and each layer's `first`, `second`, `bias` (zeros) and `threshold`, one layer in memory at a time. float16 is
      widened, as are layers of different dtypes. A matrix that is not finite raises `InflashError` when its turn comes.

    Raises:
      InflashError: files are missing, too many, unsafe, or not of this model; or PyTorch is not installed.
    """
    files = [open_file(path) for path in _layer_files(folder, store.config.num_layers)]
    formats = [_format_of(file) for file in files]
    for file, kind in zip(files, formats, strict=True):
        if kind is not formats[0]:
            raise InflashError(
                f"{file.path}: expected {formats[0].owner}'s format, as in {files[0].path.name}, found {kind.owner}'s; "
                "leave the files of one predictor in the folder"
            )
    kind = formats[0]
    dtypes = {_dtype_of(file, name) for file in files for name in (kind.first, kind.second)}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    info = PredictorInfo(
        kind=LOW_RANK,
        method="imported",
        ranks=tuple(_rank_of(file, kind, store.config) for file in files),
        dtype="float32" if dtype == "float16" else dtype,  # float16 is slow on CPUs, and every value of it is a float32
        between=kind.between,
        ahead=ahead,
    )
    threshold = _sparse_threshold(folder) if kind is _POWER_INFER else 0.0
    return info, (_read_layer(file, kind, info.dtype, threshold) for file in files)


def check_threshold(value: object, where: str) -> float:
    """A threshold that float32 can hold.

    Raises:
      InflashError: `value`, which comes from `where`, is no such number.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= float(np.finfo(np.float32).max):
        raise InflashError(f"{where}: expected a finite number that scores are compared with, such as 0.0, found {value!r}")
    return float(value)


def _layer_files(folder: Path, num_layers: int) -> list[Path]:
    """The file of each layer, in order."""
    if not folder.is_dir():
        raise InflashError(f"{folder}: expected a folder with one file a layer, such as {_EXAMPLES}, found no folder")
    files: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        layer = _layer_number(path) if path.suffix in _SUFFIXES else None
        if layer is None:
            continue
        if layer in files:
            raise InflashError(
                f"{folder}: expected one file a layer, found {files[layer].name} and {path.name} for layer {layer}; "
                "leave the files of one predictor in the folder"
            )
        files[layer] = path
    if not files:
        raise InflashError(f"{folder}: expected one file a layer, such as {_EXAMPLES}, found none ({', '.join(_SUFFIXES)})")
    missing = [layer for layer in range(num_layers) if layer not in files]
    extra = sorted(layer for layer in files if layer >= num_layers)
    if missing or extra:
        found = [f"none for layer {_list(missing)}"] if missing else []
        found += [f"one for layer {_list(extra)}"] if extra else []
        raise InflashError(
            f"{folder}: expected a file for each of the model's layers 0 to {num_layers - 1}, found {' and '.join(found)}; "
            "is it another model's predictor?"
        )
    return [files[layer] for layer in range(num_layers)]


def _layer_number(path: Path) -> int | None:
    """3 for `model_3.pt` and `opt_layer3_lr0.001.pt`; "layer" is the surer sign of the two."""
    for word in ("layer", "model"):
        numbers = {int(digits) for digits in re.findall(rf"{word}[-_.]?([0-9]+)", path.stem, re.IGNORECASE)}
        if len(numbers) > 1:
            raise InflashError(f"{path}: expected one number after {word!r}, found {_list(sorted(numbers))}; rename the file")
        if numbers:
            return numbers.pop()
    return None


def _format_of(file: WeightFile) -> _Format:
    for kind in _FORMATS:
        if file.tensors.keys() == {kind.first, kind.second}:
            return kind
    expected = " or ".join(f"{kind.first} and {kind.second} ({kind.owner})" for kind in _FORMATS)
    found = _list(sorted(file.tensors)) if file.tensors else "none"
    raise InflashError(f"{file.path}: expected the tensors {expected} of a state dict, found {found}; save only these two")


def _dtype_of(file: WeightFile, name: str) -> str:
    dtype = file.tensors[name][1]
    if dtype not in DTYPES:
        raise InflashError(f"{file.path}: {name}: expected {', '.join(DTYPES)}, found {dtype}; save it as float32")
    return dtype


def _rank_of(file: WeightFile, kind: _Format, config: ModelConfig) -> int:
    first, second = file.tensors[kind.first][0], file.tensors[kind.second][0]
    if len(first) != 2 or first[0] == 0 or first[1] != config.d_model:
        raise InflashError(
            f"{file.path}: {kind.first}: expected shape (rank, {config.d_model}), d_model being {config.d_model}, found {first}; "
            "is it another model's predictor?"
        )
    if second != (config.d_ff, first[0]):
        raise InflashError(
            f"{file.path}: {kind.second}: expected shape {(config.d_ff, first[0])}, d_ff being {config.d_ff} and "
            f"{kind.first} of rank {first[0]}, found {second}; is it another model's predictor?"
        )
    return first[0]


def _sparse_threshold(folder: Path) -> float:
    path = folder / "config.json"
    value = read_json_object(path).get("sparse_threshold") if path.exists() else None
    return 0.0 if value is None else check_threshold(value, f"{path}: sparse_threshold")


def _read_layer(file: WeightFile, kind: _Format, dtype: str, threshold: float) -> dict[str, np.ndarray]:
    first, second = (_read(file, name, dtype) for name in (kind.first, kind.second))
    return {
        "first": first,
        "second": second,
        "bias": np.zeros(len(second), np.float32),
        "threshold": np.full(1, threshold, np.float32),
    }


def _read(file: WeightFile, name: str, dtype: str) -> np.ndarray:
    values = file.read(name, (slice(None), slice(None))).astype(dtype_of(dtype), copy=False)
    if not np.isfinite(values).all():
        raise InflashError(f"{file.path}: {name}: expected finite weights, found NaN or infinity; its training failed")
    return values


def _list(items: list) -> str:
    """`3, 4, 5 and 7 more`."""
    shown, rest = items[:3], items[3:]
    return ", ".join(map(str, shown)) + (f" and {len(rest)} more" if rest else "")
