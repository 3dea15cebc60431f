"""Writes a checkpoint as a Hugging Face directory: a safetensors file for the embeddings and one for each layer, with an index.

Axes: D d_model, F d_ff.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..errors import InflashError
from .checkpoint import CheckpointSource
from .families.opt import config_document, tensor_names
from .layout import neuron_bytes, resident_bytes, resident_layers, resident_specs
from .store import sync_tree

INDEX_FILE = "model.safetensors.index.json"


def write_huggingface(
    source: CheckpointSource, destination: Path, *, progress: Callable[[int], object] = lambda written: None
) -> None:
    """Writes the OPT checkpoint `destination`, which appears when it is whole; a layer is in memory at a time.

    Raises:
      InflashError: the destination exists, or its folder does not or is full.
    """
    parent = destination.absolute().parent
    if destination.exists():
        raise InflashError(f"{destination}: already exists; remove it or choose another name")
    if not parent.is_dir():
        raise InflashError(f"{parent}: this folder does not exist; make it first")
    needed = resident_bytes(source.config, source.dtype) + neuron_bytes(source.config, source.dtype)
    if (free := shutil.disk_usage(parent).free) < needed:
        raise InflashError(f"{parent}: the checkpoint needs {needed / 2**30:.2f} GiB, found {free / 2**30:.2f} GiB free")
    temporary = parent / f".{destination.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_files(source, temporary, progress)
        sync_tree(temporary)
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(source: CheckpointSource, folder: Path, progress: Callable[[int], object]) -> None:
    if source.tokenizer_folder is not None:
        shutil.copytree(source.tokenizer_folder, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_document(source.config, source.dtype), indent=2))
    weight_map: dict[str, str] = {}
    for layer in resident_layers(source.config):
        file = "embeddings.safetensors" if layer is None else f"layer_{layer}.safetensors"
        tensors = dict(_tensors(source, layer))
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        progress(sum(tensor.nbytes for tensor in tensors.values()))
    total = resident_bytes(source.config, source.dtype) + neuron_bytes(source.config, source.dtype)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _tensors(source: CheckpointSource, layer: int | None) -> Iterator[tuple[str, np.ndarray]]:
    for spec in resident_specs(source.config, layer, source.dtype):
        values = source.resident_tensor(spec.name, layer)
        names = tensor_names(spec.name, layer)
        for name, part in zip(names, np.split(values, len(names)), strict=True):
            yield name, np.ascontiguousarray(part)
    if layer is not None:
        up_name, down_name = tensor_names("neurons", layer)
        neurons = source.neuron_rows(layer, 0, source.config.d_ff)
        yield up_name, np.ascontiguousarray(neurons[:, 0])
        yield down_name, np.ascontiguousarray(neurons[:, 1].T)
