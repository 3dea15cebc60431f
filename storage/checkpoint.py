"""Where a model to convert comes from: a Hugging Face directory, or an Orbax checkpoint of the canonical tensors.

Axes: F d_ff, P parts of a bundle (up, down), D d_model.
"""

from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from ..errors import InflashError
from .huggingface import HuggingFaceSource
from .model_config import ModelConfig
from .orbax_source import MANIFEST, OrbaxSource


class CheckpointSource(Protocol):
    """A checkpoint's tensors by their canonical names, read one at a time: nothing larger than one tensor is ever in memory."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> str:
        """Canonical name of the weights' dtype: that of the first layer's first feed-forward matrix."""
        ...

    @property
    def description(self) -> str:
        """Where the model came from, for people."""
        ...

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where tokenizer and config files lie; None: there are none."""
        ...

    def resident_tensor(self, name: str, layer: int | None) -> np.ndarray:
        """A copy of a resident tensor: name and shape of its `TensorSpec`, in the checkpoint's dtype (float32 where it has none)."""
        ...

    def neuron_rows(self, layer: int, start: int, stop: int) -> np.ndarray:
        """[stop - start, P, D] a copy of the bundles of neurons start (inclusive) to stop (exclusive), in the checkpoint's dtype."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...


def open_source(path: Path) -> CheckpointSource:
    """Opens a checkpoint and checks it as far as can be told without reading the weights.

    Raises:
      InflashError: the path is no checkpoint, the checkpoint is damaged, or the model is not supported.
    """
    if not path.exists():
        raise InflashError(f"{path}: no such directory; expected a Hugging Face or Orbax checkpoint")
    if not path.is_dir():
        raise InflashError(f"{path}: expected the directory of a Hugging Face or Orbax checkpoint, found a file")
    if (path / MANIFEST).exists():
        return OrbaxSource(path)
    return HuggingFaceSource(path)
