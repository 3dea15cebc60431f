"""The canonical description of a model: what the store, the engine and the kernels agree on.

A family (`storage/families/`) translates a Hugging Face `config.json` into this; nothing else knows Hugging Face's names.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InflashError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a decoder whose feed-forward neurons live on flash.

    Attributes:
      family: the translator's name, as in Hugging Face's `model_type`.
      vocab_size: V, rows of the token embedding.
      d_model: D, width of the residual stream.
      d_ff: F, neurons of one feed-forward block.
      num_layers: decoder layers.
      num_heads: attention heads; D is a multiple of it.
      max_positions: the longest sequence, in tokens.
      embed_dim: E, width of the token embedding; other than D only with projections in and out (OPT-350m).
      activation: the feed-forward nonlinearity.
      norm_first: LayerNorm before attention and FFN (pre-LN); False: after the residual sum (OPT-350m).
      final_norm: a LayerNorm after the last layer.
      tied_head: the output head is the token embedding.
      norm_epsilon: added to the variance in every LayerNorm.
      position_offset: row of the position table that position 0 uses.
      bos_token_id, eos_token_id, pad_token_id: special tokens.
    """

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    max_positions: int
    embed_dim: int
    activation: str = "relu"
    norm_first: bool = True
    final_norm: bool = True
    tied_head: bool = True
    norm_epsilon: float = 1e-5
    position_offset: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 2
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "max_positions", "embed_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InflashError(f"model config: {name} should be a positive integer, found {value!r}")
        if self.d_model % self.num_heads:
            raise InflashError(
                f"model config: d_model should be a multiple of num_heads, found {self.d_model} and {self.num_heads}"
            )
        if self.activation != "relu":
            raise InflashError(f"model config: activation should be 'relu', found {self.activation!r}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def num_parts(self) -> int:
        """P: matrices that a neuron has a row in; 2 for up and down."""
        return 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "ModelConfig":
        """The config of a store's attributes. Unknown keys are errors: a newer writer meant something by them."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(document) - known)
        if unknown:
            raise InflashError(f"model config: unknown keys {unknown}; this inflash knows {sorted(known)}")
        try:
            return cls(**document)
        except TypeError as error:
            raise InflashError(f"model config: {error}") from error
