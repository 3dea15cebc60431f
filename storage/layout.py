"""Where every byte of a store is: the one place that says it.

Axes: F d_ff, P parts of a bundle (up, down), D d_model, V vocabulary, E embed_dim.

A store is a Zarr v3 group in a directory. Neurons lie in `ffn/{layer}/bundles` [F, P, D], one shard a layer and one inner chunk a
bundle, uncompressed, so that a bundle is one contiguous byte range. The rest of the weights are Orbax checkpoints, one for the
embeddings and one a layer, so that they can be written (and, for the naive mode, streamed) a layer at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ..errors import InflashError
from .model_config import ModelConfig

FORMAT_VERSION = 1
ATTRIBUTES_KEY = "inflash"
TOKENIZER_FOLDER = "tokenizer"
RESIDENT_FOLDER = "resident"
PREDICTORS_FOLDER = "predictors"
EMBEDDINGS = "embeddings"

DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
PART_NAMES = {2: ("up", "down"), 3: ("gate", "up", "down")}


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of a stored tensor's dtype name: a weight dtype, or uint8 for packed bits."""
    if name == "uint8":
        return np.dtype(np.uint8)
    if name not in DTYPES:
        raise InflashError(f"dtype should be one of {', '.join(DTYPES)}, found {name!r}")
    return DTYPES[name]


def storage_dtype(name: str) -> np.dtype:
    """The dtype that the Zarr array declares: zarr-python has no bfloat16, so its bits are kept as uint16."""
    return np.dtype(np.uint16) if name == "bfloat16" else dtype_of(name)


def bundles_path(layer: int) -> str:
    return f"ffn/{layer}/bundles"


def rows_path(layer: int, part: int) -> str:
    """The array [F, 1, D] of one part's rows, in a copy without bundles (`split_rows`)."""
    return f"{layer}/{part}"


def checksums_path(layer: int) -> str:
    return f"ffn/{layer}/checksums"


def neuron_order_path(layer: int) -> str:
    return f"ffn/{layer}/neuron_order"


def resident_name(layer: int | None) -> str:
    """The folder of one Orbax checkpoint below `resident/`: a layer's, or the embeddings' for None."""
    return EMBEDDINGS if layer is None else f"layer_{layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleLayout:
    """The shape of one layer's bundles.

    Attributes:
      num_neurons: F.
      num_parts: P.
      d_model: D.
      dtype: name of the weights' dtype.
    """

    num_neurons: int
    num_parts: int
    d_model: int
    dtype: str

    @classmethod
    def of(cls, config: ModelConfig, dtype: str) -> "BundleLayout":
        return cls(num_neurons=config.d_ff, num_parts=config.num_parts, d_model=config.d_model, dtype=dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_neurons, self.num_parts, self.d_model

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one part."""
        return self.d_model * dtype_of(self.dtype).itemsize

    @property
    def bundle_bytes(self) -> int:
        return self.num_parts * self.row_bytes

    @property
    def layer_bytes(self) -> int:
        return self.num_neurons * self.bundle_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One resident tensor: its canonical name (the key in its Orbax checkpoint), shape and dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * dtype_of(self.dtype).itemsize


def resident_specs(config: ModelConfig, layer: int | None, dtype: str) -> tuple[TensorSpec, ...]:
    """The tensors of one resident checkpoint: a layer's, or the embeddings' for None.

    Matrices are [outputs, inputs] in the store's dtype; vectors are float32. Every model has every tensor that its config asks for:
    where a checkpoint has none (Galactica's biases and norms), the converter writes the zeros or ones that change nothing.
    """
    d_model, d_ff = config.d_model, config.d_ff

    def matrix(name: str, rows: int, columns: int) -> TensorSpec:
        return TensorSpec(name=name, shape=(rows, columns), dtype=dtype)

    def vector(name: str, length: int) -> TensorSpec:
        return TensorSpec(name=name, shape=(length,), dtype="float32")

    if layer is not None:
        return (
            vector("attention_norm_scale", d_model),
            vector("attention_norm_bias", d_model),
            matrix("qkv", 3 * d_model, d_model),
            vector("qkv_bias", 3 * d_model),
            matrix("attention_out", d_model, d_model),
            vector("attention_out_bias", d_model),
            vector("ffn_norm_scale", d_model),
            vector("ffn_norm_bias", d_model),
            vector("up_bias", d_ff),
            vector("down_bias", d_model),
        )
    specs = [
        matrix("tokens", config.vocab_size, config.embed_dim),
        matrix("positions", config.max_positions + config.position_offset, d_model),
    ]
    if config.embed_dim != d_model:
        specs += [matrix("project_in", d_model, config.embed_dim), matrix("project_out", config.embed_dim, d_model)]
    if config.final_norm:
        specs += [vector("final_norm_scale", d_model), vector("final_norm_bias", d_model)]
    if not config.tied_head:
        specs.append(matrix("head", config.vocab_size, config.embed_dim))
    return tuple(specs)


def resident_layers(config: ModelConfig) -> Iterator[int | None]:
    """Every resident checkpoint of a model: the embeddings (None), then the layers in order."""
    yield None
    yield from range(config.num_layers)


def resident_bytes(config: ModelConfig, dtype: str) -> int:
    return sum(spec.nbytes for layer in resident_layers(config) for spec in resident_specs(config, layer, dtype))


def neuron_bytes(config: ModelConfig, dtype: str) -> int:
    return config.num_layers * BundleLayout.of(config, dtype).layer_bytes
