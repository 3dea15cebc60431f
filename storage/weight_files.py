"""Reads tensors, whole or in part, out of the weight files of a Hugging Face directory.

A file is opened anew for every block that is read: the pages of a memory-mapped file count as the process's memory for as long as
the mapping lives, and a conversion must not grow by the size of the model.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import InflashError
from .json_files import read_json_object
from .layout import DTYPES, dtype_of
from .torch_file import TorchFile

_BLOCK_BYTES = 64 << 20  # of a file that are mapped, and copied, at a time
_SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_SAFETENSORS_INDEX, _TORCH_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


class WeightFile(Protocol):
    """One file of tensors.

    Attributes:
      path: the file.
      tensors: shape and dtype of each of its tensors; a dtype that inflash does not know goes by the file format's own name.
    """

    path: Path
    tensors: dict[str, tuple[tuple[int, ...], str]]

    def read(self, name: str, selection: tuple[slice, ...]) -> np.ndarray:
        """A copy of the selected part of a tensor."""
        ...


class SafetensorsFile:
    """A `.safetensors` file.

    Raises:
      InflashError: the file is missing, truncated or not in this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                view = file.get_slice(name)
                dtype = str(view.get_dtype())
                self.tensors[name] = tuple(view.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype)

    def read(self, name: str, selection: tuple[slice, ...]) -> np.ndarray:
        with self._open() as file:
            return file.get_slice(name)[selection]

    def _open(self) -> safe_open:
        try:
            return safe_open(self.path, framework="np")
        except SafetensorError as error:
            raise InflashError(f"{self.path}: not a whole safetensors file ({error}); download it again") from error
        except OSError as error:
            raise InflashError(f"{self.path}: cannot be read ({error})") from error


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """All the tensors of a checkpoint, whichever file each is in.

    Attributes:
      folder: where the files are.
      file_of: the file of each tensor.
    """

    folder: Path
    file_of: dict[str, WeightFile]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).tensors[name][0]

    def dtype(self, name: str) -> str:
        """The canonical name of a tensor's dtype.

        Raises:
          InflashError: the checkpoint lacks the tensor, or its dtype is none of a store's (quantised weights, for example).
        """
        file = self._find(name)
        dtype = file.tensors[name][1]
        if dtype not in DTYPES:
            raise InflashError(
                f"{file.path}: tensor {name} should be one of {', '.join(DTYPES)}, found {dtype}; "
                "convert an unquantised checkpoint"
            )
        return dtype

    def common_dtype(self, names: Iterable[str]) -> str:
        """The dtype that holds every value of all the tensors: theirs where it is one, else float32."""
        dtypes = {self.dtype(name) for name in names}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> np.ndarray:
        """A copy of a tensor's rows (along its first axis), or of some columns of them, in its own dtype.

        Reads at most about 64 MiB of the file at a time, so that the memory needed is little more than the result's.
        """
        file = self._find(name)
        shape = self.shape(name)
        rest = () if columns is None else (columns,)
        start, stop, _ = rows.indices(shape[0])
        width = shape[1:] if columns is None else (len(range(*columns.indices(shape[1]))),)
        result = np.empty((max(0, stop - start), *width), dtype_of(self.dtype(name)))
        if not result.size:  # safetensors refuses empty slices at a tensor's end
            return result
        row_bytes = result.itemsize * int(np.prod(shape[1:]))
        block = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for begin in range(start, stop, block):
            end = min(begin + block, stop)
            result[begin - start : end - start] = file.read(name, (slice(begin, end), *rest))
        return result

    def _find(self, name: str) -> WeightFile:
        if name not in self.file_of:
            raise InflashError(f"{self.folder}: tensor {name} is missing from the checkpoint's weight files")
        return self.file_of[name]


def open_weight_files(folder: Path) -> WeightFiles:
    """Opens a directory's weights: `model.safetensors`, its shards, `pytorch_model.bin` or its shards, the first that is there.

    Raises:
      InflashError: there are none, one is damaged or missing, an index contradicts its shards, or PyTorch is needed and not installed.
    """
    layouts: tuple[tuple[str, str, Callable[[Path], WeightFile]], ...] = (
        ("model.safetensors", _SAFETENSORS_INDEX, SafetensorsFile),
        ("pytorch_model.bin", _TORCH_INDEX, TorchFile),
    )
    for single, index, open_file in layouts:
        if (folder / single).exists():
            file = open_file(folder / single)
            return WeightFiles(folder, dict.fromkeys(file.tensors, file))
        if (folder / index).exists():
            return WeightFiles(folder, _open_shards(folder / index, open_file))
    raise InflashError(
        f"{folder}: expected weights in model.safetensors, {_SAFETENSORS_INDEX}, pytorch_model.bin or {_TORCH_INDEX}, found none of them"
    )


def _open_shards(index: Path, open_file: Callable[[Path], WeightFile]) -> dict[str, WeightFile]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InflashError(f"{index}: weight_map should be an object of tensor names and file names, found something else")
    shards: dict[str, WeightFile] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise InflashError(f"{index}: weight_map should name files beside it, found {shard!r}")
        if not (index.parent / shard).is_file():
            raise InflashError(f"{index}: names the shard {shard!r}, which is missing; download it too")
        shards[shard] = open_file(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise InflashError(f"{index.parent / shard}: tensor {name} is missing, although {index.name} says that it is here")
    return {name: shards[shard] for name, shard in weight_map.items()}
