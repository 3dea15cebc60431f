"""Tokens of prompts packed for kernels, whoever they belong to: many short prompts cost what one long prompt does.

Axes: T tokens of a chunk, B sequences.

Only attention knows whose a token is. To the rest of a layer a chunk is T rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels.attention import PIECE
from .fixed_shapes import CHUNK_SIZES, padded

_NOBODY = np.int32(1 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One or many sequences' tokens, one sequence's after the other's, padded to one of CHUNK_SIZES.

    Attributes:
      count: real tokens.
      token_ids: [T] int32.
      places: [6, T] int32, all that attention has to know, in one array, as each argument of a kernel costs a transfer: `sequences`,
        `positions` and `pieces`.
    """

    count: int
    token_ids: np.ndarray
    places: np.ndarray

    @classmethod
    def pack(cls, token_ids: np.ndarray, sequences: np.ndarray, positions: np.ndarray, size: int) -> "Chunk":
        """Up to `size` tokens, each array [count] int32."""
        count = len(token_ids)
        found = _pieces(sequences, positions)
        places = np.zeros((6, size), np.int32)
        places[0, count:] = _NOBODY
        places[0, :count], places[1, :count], places[2:, : found.shape[1]] = sequences, positions, found
        return cls(count=count, token_ids=padded(token_ids, size), places=places)

    @property
    def sequences(self) -> np.ndarray:
        """[T] int32, whose tokens they are; padding is nobody's, and no sequence has its number."""
        return self.places[0]

    @property
    def positions(self) -> np.ndarray:
        """[T] int32, in their sequences."""
        return self.places[1]

    @property
    def pieces(self) -> np.ndarray:
        """[pieces, 4] int32, the stretches that attend together.

        Sequence, position of the first token, its row in the chunk, and how many there are, up to PIECE.
        """
        return self.places[2:, : np.count_nonzero(self.places[5])].T

    @property
    def active(self) -> np.ndarray:
        """[T] bool, the real tokens."""
        return np.arange(len(self.token_ids)) < self.count

    def last_rows(self, num_seqs: int) -> np.ndarray:
        """[B] int32: the row of each sequence's last token here; T where it has none."""
        rows = np.full(num_seqs, len(self.token_ids), np.int32)
        rows[self.sequences[: self.count]] = np.arange(self.count)  # of several rows the last one stays
        return rows


def pack_prompts(prompts: Iterable[tuple[int, np.ndarray, int]], most_tokens: int) -> list[list[Chunk]]:
    """Prompts in passes of chunks, in their order.

    Args:
      prompts: of each its sequence, its token ids [length] int32, and from which position on it is to pass. None twice.
      most_tokens: that pass together.
    """
    parts = [(ids[first:], np.full(len(ids) - first, sequence), np.arange(first, len(ids))) for sequence, ids, first in prompts]
    token_ids, sequences, positions = (np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True))
    passes = []
    for begin in range(0, len(token_ids), most_tokens):
        passes.append([])
        for start, stop, size in cut(begin, min(begin + most_tokens, len(token_ids))):
            rows = slice(start, stop)
            passes[-1].append(Chunk.pack(token_ids[rows], sequences[rows], positions[rows], size))
    return passes


def cut(start: int, stop: int) -> list[tuple[int, int, int]]:
    """(start, stop, size) of chunks for these rows: the largest size that is not mostly padding, which costs as much as tokens."""
    chunks = []
    while start < stop:
        size = sizes_for(stop - start)[-1]
        chunks.append((start, min(start + size, stop), size))
        start += size
    return chunks


def sizes_for(most_tokens: int) -> list[int]:
    """Sizes of the chunks that so many tokens, or fewer, are cut into."""
    return [size for size in CHUNK_SIZES if size == CHUNK_SIZES[0] or most_tokens > 3 * size // 4]


def num_tokens(chunks: Sequence[Chunk]) -> int:
    """Real ones."""
    return sum(chunk.count for chunk in chunks)


def _pieces(sequences: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[4, pieces]: each sequence's tokens in the rows of a chunk, PIECE by PIECE."""
    rows = np.arange(len(sequences))
    begins = np.flatnonzero(np.diff(sequences, prepend=-1))
    within = rows - np.repeat(begins, np.diff(begins, append=len(rows)))
    first = np.flatnonzero(within % PIECE == 0)
    return np.stack([sequences[first], positions[first], first, np.diff(first, append=len(rows))])
