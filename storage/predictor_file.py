"""A predictor as one safetensors file, so that what was trained once serves every store of the same model.

Its tensors are those of `predictor_specs`, by neuron: `layer_3.first` and so on. The metadata's key `inflash_predictor` holds a JSON
object: the predictor's description, the sizes of its model, and every tensor's CRC32C, as safetensors itself has no checksums.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import InflashError, RunError
from .layout import DTYPES, TensorSpec
from .model_config import ModelConfig
from .predictor_layout import PredictorInfo, predictor_specs
from .predictor_store import load_predictor_layer
from .resident import checksum_of
from .store import Store
from .weight_files import SafetensorsFile

METADATA_KEY = "inflash_predictor"
SUFFIX = ".safetensors"
_SIZES = ("d_model", "d_ff", "num_layers")
_AGAIN = "export it again with inflash export-predictor, or copy it again"


def write_predictor_file(store: Store, name: str, path: Path) -> None:
    """Writes the predictor `name` to `path`, which appears when it is whole. Needs as much memory as the predictor.

    Raises:
      InflashError: there is no such predictor, it is damaged, or `path` exists or cannot be a predictor file's.
      RunError: the disk is full, or refuses to be written.
    """
    if name not in store.predictors:
        found = ", ".join(store.predictors) or "none"
        raise InflashError(f"{store.path}: expected one of its predictors ({found}), found the name {name!r}")
    if path.suffix != SUFFIX:
        raise InflashError(f"{path}: expected a name that ends in {SUFFIX}, for inflash import-predictor to know the file by")
    if os.path.lexists(path):
        raise InflashError(f"{path}: already exists; remove it or choose another name")
    if not path.absolute().parent.is_dir():
        raise InflashError(f"{path.absolute().parent}: this folder does not exist; make it first")
    tensors: dict[str, np.ndarray] = {}
    for layer in range(store.config.num_layers):
        for key, values in load_predictor_layer(store, name, layer, verify=True).items():
            tensors[_tensor_name(layer, key)] = np.ascontiguousarray(values)  # safetensors would take strided memory as it lies
    document = {
        **store.predictors[name].to_json(),
        **_sizes(store.config),
        "checksums": {key: checksum_of(values) for key, values in tensors.items()},
    }
    _save(tensors, {METADATA_KEY: json.dumps(document)}, path)


def read_predictor_file(store: Store, path: Path) -> tuple[PredictorInfo, Iterator[dict[str, np.ndarray]]]:
    """Opens what `write_predictor_file` wrote, from a store of the same model.

    Returns:
      The description, and each layer's tensors of `predictor_specs`, one layer in memory at a time. What the header says has been
      checked; a layer's checksums are when its turn comes, which raises `InflashError` where they do not match.

    Raises:
      InflashError: the file is missing or damaged, holds no predictor, or one for a model of other sizes.
    """
    file = SafetensorsFile(path)
    document = _read_document(path)
    wanted, found = _sizes(store.config), {key: document.pop(key, None) for key in _SIZES}
    if found != wanted:
        raise InflashError(
            f"{path}: expected a predictor for {_words(wanted)}, as {store.path} has, found one for {_words(found)}; "
            "a predictor serves only the model that it was made for"
        )
    checksums = document.pop("checksums", None)
    info = _description(path, document, store)
    layers = [predictor_specs(store.config, info, layer) for layer in range(store.config.num_layers)]
    _check_tensors(file, {_tensor_name(layer, spec.name): spec for layer, specs in enumerate(layers) for spec in specs})
    if not isinstance(checksums, dict) or checksums.keys() != file.tensors.keys():
        raise InflashError(f"{path}: expected a checksum for each of its {len(file.tensors)} tensors, found others; {_AGAIN}")
    return info, (_read_layer(file, layer, specs, checksums) for layer, specs in enumerate(layers))


def _save(tensors: dict[str, np.ndarray], metadata: dict[str, str], path: Path) -> None:
    temporary = path.absolute().with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read; this one is for sharing
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be written ({error}); is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read_document(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        raise InflashError(
            f"{path}: expected a predictor of inflash export-predictor, found safetensors without the metadata {METADATA_KEY!r}"
        )
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InflashError(f"{path}: the metadata {METADATA_KEY!r} should be JSON, found something else; {_AGAIN}") from error
    if not isinstance(document, dict):
        raise InflashError(
            f"{path}: the metadata {METADATA_KEY!r} should be an object, found {type(document).__name__}; {_AGAIN}"
        )
    return document


def _description(path: Path, document: dict[str, Any], store: Store) -> PredictorInfo:
    """The description, with the types that `PredictorInfo.from_json` trusts in a store but a stranger's file may not have."""
    try:
        info = PredictorInfo.from_json(document, store.dtype, store.config.num_layers)
    except InflashError as error:
        raise InflashError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise InflashError(
            f"{path}: the predictor's description is damaged, or of a newer inflash ({error}); {_AGAIN}"
        ) from error
    recall_fits = info.recall is None or (isinstance(info.recall, int | float) and 0 <= info.recall <= 1)
    tokens_fit = isinstance(info.tokens, int) and info.tokens >= 0
    if not isinstance(info.method, str) or info.dtype not in DTYPES or not recall_fits or not tokens_fit:
        raise InflashError(
            f"{path}: expected a method in words, a dtype of {', '.join(DTYPES)}, a recall of 0 to 1 or null, and a count of tokens, "
            f"found {info.method!r}, {info.dtype!r}, {info.recall!r} and {info.tokens!r}; {_AGAIN}"
        )
    return info


def _check_tensors(file: SafetensorsFile, specs: dict[str, TensorSpec]) -> None:
    found = {name: (shape, "uint8" if dtype == "U8" else dtype) for name, (shape, dtype) in file.tensors.items()}
    for name in sorted(specs.keys() | found.keys()):
        if name not in found or name not in specs:
            state = "missing" if name not in found else "unknown"
            raise InflashError(f"{file.path}: the tensor {name} is {state}, by the file's own description; {_AGAIN}")
        shape, dtype = found[name]
        if (shape, dtype) != (specs[name].shape, specs[name].dtype):
            expected = f"{specs[name].dtype} {specs[name].shape}"
            raise InflashError(f"{file.path}: tensor {name}: expected {expected}, found {dtype} {shape}; {_AGAIN}")


def _read_layer(
    file: SafetensorsFile, layer: int, specs: tuple[TensorSpec, ...], checksums: dict[str, str]
) -> dict[str, np.ndarray]:
    tensors = {}
    for spec in specs:
        name = _tensor_name(layer, spec.name)
        values = file.read(name, (slice(None),) * len(spec.shape))
        if (found := checksum_of(values)) != checksums[name]:
            raise InflashError(f"{file.path}: tensor {name}: expected checksum {checksums[name]}, found {found}; {_AGAIN}")
        tensors[spec.name] = values
    return tensors


def _tensor_name(layer: int, name: str) -> str:
    return f"layer_{layer}.{name}"


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {key: getattr(config, key) for key in _SIZES}


def _words(sizes: dict[str, Any]) -> str:
    return f"{sizes['num_layers']} layers of d_model {sizes['d_model']}, d_ff {sizes['d_ff']}"
