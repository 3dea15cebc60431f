"""The few sizes that kernels are compiled for: what varies is padded to the next of them, so that nothing compiles while running."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CHUNK_SIZES = (32, 64, 256)
"""Tokens of a prompt that a kernel takes at once."""
SMALLEST_GATHER = 64
"""Neurons: a kernel call for fewer costs as much as for these."""
SMALLEST_CAPACITY = 64
"""Positions of the KV cache."""


def doublings(smallest: int, most: int) -> list[int]:
    """Sizes that double from `smallest` while below `most`, and `most` itself."""
    sizes = []
    while smallest < most:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, most]


def fitting(count: int, sizes: list[int] | tuple[int, ...]) -> int:
    """The first of ascending sizes that holds `count`."""
    return next(size for size in sizes if size >= count)


def capacity_for(length: int) -> int:
    """Positions of a KV cache that holds `length`: a power of two."""
    return max(SMALLEST_CAPACITY, 1 << (length - 1).bit_length())


def padded(values: np.ndarray, size: int) -> np.ndarray:
    """[size] int32: the values, then zeros."""
    result = np.zeros(size, np.int32)
    result[: len(values)] = values
    return result


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of one sequence's prompt: `count` real tokens from position `start`, padded to `len(token_ids)`."""

    sequence: int
    start: int
    count: int
    token_ids: np.ndarray


def split_prompt(sequence: int, token_ids: np.ndarray, first: int = 0) -> list[Chunk]:
    """A prompt from its position `first` on, in chunks of the largest size that is not mostly padding, which costs as much as tokens."""
    chunks, start = [], first
    while start < len(token_ids):
        left = len(token_ids) - start
        size = next((size for size in reversed(CHUNK_SIZES) if left > 3 * size // 4), CHUNK_SIZES[0])
        part = token_ids[start : start + size]
        chunks.append(Chunk(sequence, start, len(part), padded(part, size)))
        start += size
    return chunks


def group_chunks(chunks: Sequence[Chunk], most_tokens: int) -> list[list[Chunk]]:
    """Chunks in their order, in groups of at most so many tokens, or of one chunk with more."""
    groups, left = [], 0
    for chunk in chunks:
        if not groups or chunk.count > left:
            groups.append([])
            left = most_tokens
        groups[-1].append(chunk)
        left -= chunk.count
    return groups
