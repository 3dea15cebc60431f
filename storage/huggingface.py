"""A Hugging Face directory as the source of a conversion.

Axes: F d_ff, P parts of a bundle, D d_model.
"""

from pathlib import Path

import numpy as np

from ..errors import InflashError
from .families.registry import translate
from .json_files import read_json_object
from .layout import TensorSpec, dtype_of, resident_layers, resident_specs
from .model_config import ModelConfig
from .weight_files import open_weight_files


class HuggingFaceSource:
    """See `checkpoint.CheckpointSource`. Every tensor's presence, shape and dtype is checked at once, before anything is read.

    Raises:
      InflashError: files are missing or damaged, the model is not supported, or tensors contradict config.json.
    """

    def __init__(self, folder: Path) -> None:
        config_file = folder / "config.json"
        if not config_file.exists():
            raise InflashError(f"{folder}: expected a Hugging Face checkpoint, found no config.json")
        document = read_json_object(config_file)
        self._weights = open_weight_files(folder)
        try:
            self._translation = translate(document, self._weights.file_of.keys())
        except InflashError as error:
            raise InflashError(f"{config_file}: {error}") from error
        self.config: ModelConfig = self._translation.config
        self.description = str(folder)
        self.tokenizer_folder: Path | None = folder
        self.dtype = self._weights.dtype(self._translation.neuron_parts(0)[0].name)
        self._specs = {
            (layer, spec.name): spec
            for layer in resident_layers(self.config)
            for spec in resident_specs(self.config, layer, self.dtype)
        }
        self._check()

    def resident_tensor(self, name: str, layer: int | None) -> np.ndarray:
        spec = self._specs[layer, name]
        recipe = self._translation.resident(name, layer)
        if not recipe.names:
            return np.full(spec.shape, recipe.constant, np.float32)
        if len(recipe.names) == 1:
            return self._weights.read(recipe.names[0])
        tensor = np.empty(spec.shape, dtype_of(self._weights.common_dtype(recipe.names)))
        for part, name in zip(np.split(tensor, len(recipe.names)), recipe.names, strict=True):
            part[...] = self._weights.read(name)
        return tensor

    def neuron_rows(self, layer: int, start: int, stop: int) -> np.ndarray:
        parts = self._translation.neuron_parts(layer)
        dtype = dtype_of(self._weights.common_dtype(part.name for part in parts))
        rows = np.empty((stop - start, len(parts), self.config.d_model), dtype)
        neurons = slice(start, stop)
        for place, part in enumerate(parts):
            if part.neuron_axis == 0:
                rows[:, place] = self._weights.read(part.name, neurons)
            else:
                rows[:, place] = self._weights.read(part.name, columns=neurons).T
        return rows

    def close(self) -> None:
        """Nothing stays open between reads."""

    def __enter__(self) -> "HuggingFaceSource":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check(self) -> None:
        expected = self._expected_shapes()
        for name, shape in expected.items():
            found = self._weights.shape(name)
            if found != shape:
                path = self._weights.file_of[name].path
                raise InflashError(f"{path}: tensor {name} should have shape {shape} by config.json, found {found}")
            self._weights.dtype(name)
        for name in sorted(self._weights.file_of.keys() - expected.keys()):
            if self._translation.owns(name):
                path = self._weights.file_of[name].path
                raise InflashError(f"{path}: tensor {name} contradicts config.json, by which the model has no such tensor")

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape by config.json of every tensor that the conversion will read."""
        shapes: dict[str, tuple[int, ...]] = {}
        for (layer, name), spec in self._specs.items():
            names = self._translation.resident(name, layer).names
            shapes.update(dict.fromkeys(names, _share(spec, len(names))))
        for layer in range(self.config.num_layers):
            for part in self._translation.neuron_parts(layer):
                shape = (self.config.d_ff, self.config.d_model)
                shapes[part.name] = shape if part.neuron_axis == 0 else shape[::-1]
        return shapes


def _share(spec: TensorSpec, num_tensors: int) -> tuple[int, ...]:
    """The shape of each of the tensors that are stacked to a resident one."""
    return (spec.shape[0] // max(1, num_tensors), *spec.shape[1:])
