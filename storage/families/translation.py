"""What a family tells about a Hugging Face checkpoint: its canonical config, and which of its tensors make the canonical ones."""

from dataclasses import dataclass
from typing import Protocol

from ..model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one resident tensor is made.

    Attributes:
      names: tensors of the checkpoint, of equal shapes, stacked along their first axis; none: the tensor is `constant` everywhere.
      constant: the value of a tensor that the checkpoint does not have.
    """

    names: tuple[str, ...] = ()
    constant: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronPart:
    """The tensor of one part of a layer's bundles.

    Attributes:
      name: the checkpoint's tensor.
      neuron_axis: which of its two axes counts neurons; the other one is d_model.
    """

    name: str
    neuron_axis: int


class Translation(Protocol):
    """A family's reading of one checkpoint."""

    config: ModelConfig

    def resident(self, name: str, layer: int | None) -> Recipe:
        """The recipe of a resident tensor, named as in `layout.resident_specs`."""
        ...

    def neuron_parts(self, layer: int) -> tuple[NeuronPart, ...]:
        """A layer's feed-forward matrices in the order of a bundle's parts."""
        ...

    def owns(self, name: str) -> bool:
        """Whether a tensor is a weight of the decoder: one that no recipe uses contradicts config.json."""
        ...
