"""What stays in memory (attention, embeddings, norms, biases) and predictors: Orbax checkpoints of NumPy leaves.

Orbax holds a second copy of what it is writing, so a group of tensors is cut into pieces of at most 256 MiB, each a checkpoint of
its own. The leaves are uncompressed Zarr arrays: the naive mode streams them by byte range, at the disk's rate. `checksums.json` beside
the pieces holds the CRC32C of every leaf.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InflashError, RunError
from .checksum import crc32c
from .layout import TensorSpec, dtype_of
from .shard_index import RawArray, open_raw_array

PIECE_BYTES = 256 << 20
CHECKSUMS_FILE = "checksums.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows [start, stop) of one tensor."""

    spec: TensorSpec
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.spec.shape[1:])

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * dtype_of(self.spec.dtype).itemsize


def pieces(specs: Iterable[TensorSpec], limit: int = PIECE_BYTES) -> list[list[Piece]]:
    """Cuts tensors, in order, into checkpoints of at most `limit` bytes (or one row)."""
    checkpoints: list[list[Piece]] = [[]]
    room = limit
    for spec in specs:
        row_bytes = spec.nbytes // spec.shape[0]
        start = 0
        while start < spec.shape[0]:
            rows = min(room // row_bytes, spec.shape[0] - start)
            if rows <= 0 and checkpoints[-1]:
                checkpoints.append([])
                room = limit
                continue
            piece = Piece(spec=spec, start=start, stop=start + max(rows, 1))
            checkpoints[-1].append(piece)
            start, room = piece.stop, room - piece.nbytes
    return checkpoints


def save_tensors(folder: Path, specs: tuple[TensorSpec, ...], tensor: Callable[[str], np.ndarray]) -> None:
    """Writes the group `folder`; `tensor(name)` is asked for each tensor when its turn comes, so that one is in memory at a time.

    Raises:
      InflashError: a tensor has another shape than its spec.
      RunError: the disk is full, or refuses to be written.
    """
    held: tuple[str, np.ndarray] | None = None
    checksums: dict[str, str] = {}
    for number, checkpoint in enumerate(pieces(specs)):
        leaves = {}
        for piece in checkpoint:
            if held is None or held[0] != piece.spec.name:
                held = (piece.spec.name, tensor(piece.spec.name))
                if held[1].shape != piece.spec.shape:
                    raise InflashError(f"{piece.spec.name}: expected shape {piece.spec.shape}, found {held[1].shape}")
            leaves[piece.spec.name] = held[1][piece.start : piece.stop].astype(dtype_of(piece.spec.dtype), copy=False)
        _save_checkpoint((folder / str(number)).absolute(), leaves)
        checksums |= {f"{number}/{name}": checksum_of(leaf) for name, leaf in leaves.items()}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=1) + "\n", encoding="utf-8")


def load_tensors(
    folder: Path, specs: tuple[TensorSpec, ...], *, verify: bool = False, remedy: str = "convert the model again"
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yields every piece of the group `folder` with its rows, a checkpoint at a time.

    Args:
      folder: what `save_tensors` wrote.
      specs: the group's tensors.
      verify: compare every piece with its checksum.
      remedy: what to do about damage.

    Raises:
      InflashError: the group is missing, cannot be read, contradicts its specs, or is damaged and `verify` is set.
    """
    checksums = read_checksums(folder, remedy) if verify else {}
    for number, checkpoint in enumerate(pieces(specs)):
        path = folder / str(number)
        if not path.is_dir():
            raise InflashError(f"{path}: expected an Orbax checkpoint, found none; is the store whole?")
        try:
            with _checkpointer() as checkpointer:
                leaves = checkpointer.restore(path.absolute())
        except Exception as error:  # orbax and tensorstore raise many types; the cause stays attached
            raise InflashError(f"{path}: this Orbax checkpoint cannot be read: {_first_line(error)}") from error
        for piece in checkpoint:
            leaf = np.asarray(leaves.get(piece.spec.name))
            if leaf.shape != piece.shape or leaf.dtype != dtype_of(piece.spec.dtype):
                raise InflashError(
                    f"{path}: {piece.spec.name}: expected {piece.spec.dtype} {piece.shape}, found {leaf.dtype} {leaf.shape}"
                )
            name = f"{number}/{piece.spec.name}"
            if verify and checksums.get(name) != (found := checksum_of(leaf)):
                raise InflashError(
                    f"{folder / name}: expected checksum {checksums.get(name)}, found {found}; the store is damaged, {remedy}"
                )
            yield piece, leaf


def open_leaf(checkpoint: Path, piece: Piece) -> RawArray:
    """Where a piece's rows lie in the files of its checkpoint.

    Raises:
      InflashError: there is no such checkpoint, its files cannot be read, or they hold something else.
    """
    if not checkpoint.is_dir():
        raise InflashError(f"{checkpoint}: expected an Orbax checkpoint, found none; is the store whole?")
    try:
        array = open_raw_array(checkpoint / piece.spec.name)
    except InflashError as error:
        raise InflashError(f"{checkpoint}: this Orbax checkpoint cannot be read: {error}") from error
    if array.shape != piece.shape or array.data_type != piece.spec.dtype:
        raise InflashError(
            f"{checkpoint}: {piece.spec.name}: expected {piece.spec.dtype} {piece.shape}, found {array.data_type} {array.shape}"
        )
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """A stretch of a file and where it goes: `length` bytes from `offset`, to `target` bytes into the tensor."""

    file: Path
    offset: int
    length: int
    target: int


def byte_ranges(folder: Path, specs: tuple[TensorSpec, ...], name: str) -> list[ByteRange]:
    """Where the tensor `name` of the group `folder` lies on flash, for reading it without Orbax."""
    ranges = []
    for number, checkpoint in enumerate(pieces(specs)):
        for piece in checkpoint:
            if piece.spec.name == name:
                array = open_raw_array(folder / str(number) / name)
                target = piece.start * array.row_bytes
                length = array.shape[0] * array.row_bytes
                ranges.append(ByteRange(file=array.file, offset=int(array.row_offsets[0]), length=length, target=target))
    return ranges


def _save_checkpoint(path: Path, leaves: dict[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(leaves))
    except Exception as error:  # orbax and tensorstore raise many types; the cause stays attached
        raise RunError(f"{path}: this Orbax checkpoint cannot be written: {_first_line(error)}") from error


def checksum_of(leaf: np.ndarray) -> str:
    """CRC32C in hexadecimal of a leaf's bytes."""
    return f"{crc32c(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)):08x}"


def read_checksums(folder: Path, remedy: str) -> dict[str, str]:
    path = folder / CHECKSUMS_FILE
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InflashError(f"{path}: the checksums of this group cannot be read: {error}; {remedy}") from error
    return document if isinstance(document, dict) else {}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _checkpointer():
    logging.getLogger("absl").setLevel(logging.ERROR)  # a line of warning a checkpoint, about things that do not apply
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False))
