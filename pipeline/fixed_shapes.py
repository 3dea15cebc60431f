"""The few sizes that kernels are compiled for: what varies is padded to the next of them, so that nothing compiles while running."""

import numpy as np

CHUNK_SIZES = (64, 256)
"""Tokens of prompts that a kernel takes at once. From 64 on XLA adds up a row's products in one order, however many rows there are."""
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
    """The first of ascending sizes that holds `count`. Raises ValueError where none does."""
    for size in sizes:
        if size >= count:
            return size
    raise ValueError(f"{count} of something: kernels are compiled for {sizes[-1]} at most")


def capacity_for(length: int) -> int:
    """Positions of a KV cache that holds `length`: a power of two."""
    return max(SMALLEST_CAPACITY, 1 << (length - 1).bit_length())


def padded(values: np.ndarray, size: int) -> np.ndarray:
    """[size] int32: the values, then zeros."""
    result = np.zeros(size, np.int32)
    result[: len(values)] = values
    return result
