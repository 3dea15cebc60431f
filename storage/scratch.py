"""Arrays that may exceed memory, on disk while a job runs: what the model computes for each window of text.

Axes: W windows, C tokens of a window, D d_model, F d_ff.

Zarr arrays with a window a chunk, or several where windows are small: each chunk is a file. They are scratch: nothing else reads them.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
from numcodecs import PackBits

from ..errors import RunError

_CHUNK_BYTES = 256 << 10
_BITS_HEADER = 1  # byte that PackBits puts before the bits


class WindowArray:
    """Floats on disk.

    Attributes:
      shape: (W, C, D).
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: str, *, create: bool = False) -> None:
        """Opens the array in `folder`, or makes it where `create` is set.

        `dtype` is "float32", or "bfloat16", whose bits Zarr keeps as uint16.
        """
        self.shape = shape
        self._bits = dtype == "bfloat16"
        self._array = _open(folder, shape, np.dtype(np.uint16 if self._bits else np.float32), compressed=False, create=create)

    def write(self, first: int, values: np.ndarray) -> None:
        """Writes windows [n, C, D] from `first` on."""
        if self._bits:
            values = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        self._array[first : first + len(values)] = values

    def read(self, first: int, last: int) -> np.ndarray:
        """Windows first (inclusive) to last (exclusive), [n, C, D] float32."""
        values = np.asarray(self._array[first:last])
        return values.view(ml_dtypes.bfloat16).astype(np.float32) if self._bits else values


class BitArray:
    """Booleans on disk, eight to a byte.

    Attributes:
      shape: (W, C, F).
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], *, create: bool = False) -> None:
        """Opens the array in `folder`, or makes it where `create` is set."""
        self.shape = shape
        self._codec = PackBits()
        packed = -(-shape[1] * shape[2] // 8) + _BITS_HEADER
        self._array = _open(folder, (shape[0], packed), np.dtype(np.uint8), compressed=True, create=create)

    def write(self, first: int, values: np.ndarray) -> None:
        """Writes windows [n, C, F] from `first` on."""
        packed = [np.frombuffer(self._codec.encode(np.ascontiguousarray(window)), np.uint8) for window in values]
        self._array[first : first + len(values)] = np.stack(packed)

    def read(self, first: int, last: int) -> np.ndarray:
        """Windows first (inclusive) to last (exclusive), [n, C, F] bool."""
        rows = np.asarray(self._array[first:last])
        return np.stack([np.asarray(self._codec.decode(row)).view(bool).reshape(self.shape[1:]) for row in rows])


def _open(folder: Path, shape: tuple[int, ...], dtype: np.dtype, *, compressed: bool, create: bool):
    import zarr

    if (folder / "zarr.json").exists():
        array = zarr.open_array(str(folder), mode="r+")
        assert isinstance(array, zarr.Array) and (array.shape, array.dtype) == (shape, dtype), f"{folder} holds another array"
        return array
    if not create:  # an array made here would read as zeros
        raise RunError(f"{folder}: expected an array of an earlier step, found none; give --restart to begin anew")
    window_bytes = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    return zarr.create_array(
        str(folder),
        shape=shape,
        dtype=dtype,
        chunks=(min(max(1, _CHUNK_BYTES // window_bytes), shape[0]), *shape[1:]),
        compressors="auto" if compressed else None,
        filters=None,
        fill_value=0,
    )
