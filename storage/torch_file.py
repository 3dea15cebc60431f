"""Reads PyTorch's `.bin` files through PyTorch itself, which only this module needs: the extra `inflash[torch]`."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import InflashError


class TorchFile:
    """A state dict in a file of `torch.save`. Only tensors are unpickled (`weights_only`), and only what is read is copied.

    Raises:
      InflashError: PyTorch is not installed, or the file is damaged, holds more than tensors, or is of before PyTorch 1.6.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in self._load().items()
        }

    def read(self, name: str, selection: tuple[slice, ...]) -> np.ndarray:
        import torch  # pyright: ignore[reportMissingImports]

        # A copy, because a view would keep the file mapped.
        tensor = self._load()[name][selection].clone(memory_format=torch.contiguous_format)
        if tensor.dtype == torch.bfloat16:  # which PyTorch cannot hand to NumPy
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def _load(self) -> dict[str, Any]:
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InflashError(
                f"{self.path}: reading PyTorch's pickles needs PyTorch, which is not installed; run pip install 'inflash[torch]', "
                "or use a checkpoint in safetensors"
            ) from error
        try:
            tensors = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch.load has no error class of its own: a damaged file may raise nearly anything
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise InflashError(f"{self.path}: PyTorch cannot load it as a file of tensors ({reason})") from error
        if not isinstance(tensors, dict):
            raise InflashError(f"{self.path}: expected a dict of tensors, found {type(tensors).__name__}")
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
