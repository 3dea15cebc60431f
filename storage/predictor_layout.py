"""What a predictor in a store is: its description, and the tensors of each layer.

Axes: F d_ff, D d_model, R rank, W bytes of a packed row (D / 8, rounded up).

A predictor scores neurons from an FFN input h [D]; those whose score exceeds its threshold are named. Two kinds:

- `low_rank`, the paper's (arXiv:2312.11514, 3.1): `second @ f(first @ h) + bias`, f being nothing or, as PowerInfer has it, ReLU.
- `sign_bits`: `scale * (signs @ h) + bias`, signs being +1 or -1, a bit each.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InflashError
from .layout import TensorSpec, dtype_of
from .model_config import ModelConfig

LOW_RANK, SIGN_BITS = "low_rank", "sign_bits"
BETWEEN = ("none", "relu")
_KNOWN = "upgrade inflash, or make the predictor again"


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorInfo:
    """A predictor's description, as the store's attributes hold it.

    Attributes:
      kind: "low_rank" or "sign_bits".
      method: how it was made, e.g. "svd", "trained" or "imported"; for people, and for choosing the best.
      ranks: R of each layer; empty for sign bits.
      dtype: of the matrices; sign bits have none.
      between: what stands between the two products of "low_rank": "none" or "relu".
      ahead: 0: a layer's neurons are guessed from its own FFN input; 1: from that of the layer before (the first layer: its own).
      recall: that it was calibrated for, 0 to 1; None: unknown.
      tokens: of text that it was trained or calibrated on.
    """

    kind: str
    method: str
    ranks: tuple[int, ...] = ()
    dtype: str = "float32"
    between: str = "none"
    ahead: int = 0
    recall: float | None = None
    tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ranks": list(self.ranks)}

    @classmethod
    def from_json(cls, document: dict[str, Any], store_dtype: str, num_layers: int) -> "PredictorInfo":
        """Reads a description; what older stores leave out has the default, and the store's dtype.

        Raises:
          InflashError: this version does not know such a predictor.
          TypeError: a key is unknown, or a value has another type.
        """
        fields = {"dtype": store_dtype, **document, "ranks": tuple(document.get("ranks", ()))}
        info = cls(**fields)
        if info.kind not in (LOW_RANK, SIGN_BITS):
            raise InflashError(f"predictor kind should be {LOW_RANK} or {SIGN_BITS}, found {info.kind!r}; {_KNOWN}")
        if info.between not in BETWEEN or info.ahead not in (0, 1):
            raise InflashError(f"predictor: found between {info.between!r} and ahead {info.ahead!r}; {_KNOWN}")
        wanted = num_layers if info.kind == LOW_RANK else 0
        if len(info.ranks) != wanted or not all(isinstance(rank, int) and rank > 0 for rank in info.ranks):
            raise InflashError(f"predictor: expected {wanted} ranks, found {list(info.ranks)}; {_KNOWN}")
        dtype_of(info.dtype)
        return info


def predictor_specs(config: ModelConfig, info: PredictorInfo, layer: int) -> tuple[TensorSpec, ...]:
    """The tensors of one layer, by neuron. `first` is the paper's A, `second` its B.

    Bit j of byte w in a row of `signs` is set where the up projection's weight j * W + w is positive, so that the bytes' j-th bits
    meet W inputs that follow each other. Bits beyond D are zero.
    """
    d_model, d_ff = config.d_model, config.d_ff
    vectors = TensorSpec(name="bias", shape=(d_ff,), dtype="float32"), TensorSpec(name="threshold", shape=(1,), dtype="float32")
    if info.kind == SIGN_BITS:
        signs = TensorSpec(name="signs", shape=(d_ff, -(-d_model // 8)), dtype="uint8")
        return signs, TensorSpec(name="scale", shape=(d_ff,), dtype="float32"), *vectors
    rank = info.ranks[layer]
    first = TensorSpec(name="first", shape=(rank, d_model), dtype=info.dtype)
    return first, TensorSpec(name="second", shape=(d_ff, rank), dtype=info.dtype), *vectors


BY_NEURON = ("second", "signs", "scale", "bias")
"""Tensors whose first axis is F."""


def predictor_bytes(config: ModelConfig, info: PredictorInfo) -> int:
    """Bytes of all layers, on flash and in memory alike."""
    return sum(spec.nbytes for layer in range(config.num_layers) for spec in predictor_specs(config, info, layer))
