import numpy as np
import pytest
from paged import random_cache, random_tables, spoil

from inflash.kernels import attention, reference
from inflash.kernels.compilation import jit

SHAPES = [
    (1, 4, 64, 32, 16),
    (3, 3, 50, 16, 5),
    (5, 2, 33, 20, 33),
    (8, 12, 128, 8, 32),
]  # B, H, positions, head_dim, size of a block
TOLERANCE = 1e-5  # float32 sums of values of size 1, weighted with shares that add up to 1


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def spoil_unseen(keys: np.ndarray, values: np.ndarray, tables: np.ndarray, lengths: np.ndarray) -> None:
    """All that is in no sequence's length becomes NaN, blocks of nobody included, and tables say N for blocks that they do not need."""
    num_blocks, size = keys.shape[1:3]
    seen = np.zeros((num_blocks, size), bool)
    for table, length in zip(tables, lengths, strict=True):
        for position in range(length):
            seen[table[position // size], position % size] = True
        table[-(-length // size) :] = num_blocks
    keys[:, ~seen] = values[:, ~seen] = np.nan


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_agrees_with_reference(rng, shape):
    batch, num_heads, capacity, head_dim, size = shape
    tables, num_blocks = random_tables(rng, batch, capacity, size)
    query, keys, values = (
        normal(rng, batch, num_heads, head_dim),
        *(random_cache(rng, num_heads, num_blocks, size, head_dim) for _ in "kv"),
    )
    lengths = rng.integers(1, capacity + 1, batch, dtype=np.int32)
    expected = reference.attend_decode(query, keys, values, tables, lengths)
    spoil_unseen(keys, values, tables, lengths)
    found = jit(attention.attend_decode)(query, keys, values, tables, lengths)
    np.testing.assert_allclose(np.asarray(found), expected, atol=TOLERANCE)


@pytest.mark.parametrize("num_positions", [16, 27, 32, 64])
def test_decode_never_reads_beyond_num_positions(rng, num_positions):
    tables, num_blocks = random_tables(rng, 2, 64, 8, spare=0)
    query, keys, values = normal(rng, 2, 4, 16), *(random_cache(rng, 4, num_blocks, 8, 16) for _ in "kv")
    lengths = np.asarray([1, num_positions], np.int32)
    expected = reference.attend_decode(query, keys, values, tables, lengths)
    for table in tables:
        spoil(keys, table, num_positions)
        spoil(values, table, num_positions)
    attend = jit(attention.attend_decode, static_argnames="num_positions")
    found = attend(query, keys, values, tables, lengths, num_positions=num_positions)
    np.testing.assert_allclose(np.asarray(found), expected, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_append_writes_one_position_a_token(rng, shape):
    """One beyond its table, without a block, or nobody's is dropped, not moved."""
    batch, num_heads, capacity, head_dim, size = shape
    tables, num_blocks = random_tables(rng, batch + 1, capacity, size)
    cache, new = random_cache(rng, num_heads, num_blocks, size, head_dim), normal(rng, batch + 4, num_heads, head_dim)
    sequences = np.r_[rng.integers(0, batch, batch + 1), batch, 0, 1 << 30].astype(np.int32)
    positions = rng.permutation(capacity)[: batch + 4].astype(np.int32)
    positions[-2] = tables.shape[1] * size
    tables[batch] = num_blocks
    found = jit(attention.append)(cache, new, tables, sequences, positions)
    np.testing.assert_array_equal(np.asarray(found), reference.append(cache, new, tables, sequences, positions))


def in_pieces(stretches: list[tuple[int, int, int]], num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Stretches (sequence, first position, length) one after the other: whose tokens, [T] positions, pieces [T, 4], how many of them."""
    sequences, positions = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    pieces, place = [], 0
    for sequence, start, length in stretches:
        sequences[place : place + length], positions[place : place + length] = sequence, range(start, start + length)
        for done in range(0, length, attention.PIECE):
            pieces.append((sequence, start + done, place + done, min(attention.PIECE, length - done)))
        place += length
    padded = np.zeros((num_tokens, 4), np.int32)
    padded[: len(pieces)] = pieces
    return sequences, positions, padded, len(pieces)


@pytest.fixture(scope="module")
def attend_chunk():
    return jit(attention.attend_chunk)


@pytest.mark.parametrize("num_tokens", [64, 256])
def test_any_mix_of_prompts_agrees_with_reference(rng, attend_chunk, num_tokens):
    """Of lengths and beginnings of all kinds, two of them with blocks in common; what nobody is to see is NaN."""
    for _ in range(3):
        tables, num_blocks = random_tables(rng, 5, 160, 32)
        tables[1, :2] = tables[0, :2]
        query, keys, values = normal(rng, num_tokens, 2, 16), *(random_cache(rng, 2, num_blocks, 32, 16) for _ in "kv")
        stretches, left = [], num_tokens
        for sequence in rng.permutation(5):
            length = min(int(rng.integers(1, 71)), left)
            start = int(rng.integers(0, 160 - length + 1)) if sequence else 0
            if length:
                stretches.append((sequence, start, length))
            left -= length
        sequences, positions, pieces, num_pieces = in_pieces(stretches, num_tokens)
        count = num_tokens - left
        expected = reference.attend_decode(query[:count], keys, values, tables[sequences[:count]], positions[:count] + 1)
        lengths = np.zeros(5, np.int32)
        for sequence, start, length in stretches:
            lengths[sequence] = start + length
        spoil_unseen(keys, values, tables, lengths)
        found = np.asarray(attend_chunk(query, keys, values, tables, pieces, np.int32(num_pieces)))
        np.testing.assert_allclose(found[:count], expected, atol=TOLERANCE)
        assert np.isfinite(found).all()


def test_tokens_do_not_depend_on_who_is_beside_them(rng, attend_chunk):
    """To the bit, in chunks of any size, and however they are cut in pieces."""
    tables, num_blocks = random_tables(rng, 2, 160, 32)
    query, keys, values = normal(rng, 40, 2, 16), *(random_cache(rng, 2, num_blocks, 32, 16) for _ in "kv")
    seen = []
    for num_tokens, first, others in [(64, 0, 0), (64, 0, 7), (64, 0, 24), (256, 0, 33), (256, 0, 216), (64, 9, 3)]:
        stretches = [(0, 0, others), (1, 100 + first, 40 - first)]
        _, _, pieces, num_pieces = in_pieces([stretch for stretch in stretches if stretch[2]], num_tokens)
        chunk = normal(rng, num_tokens, 2, 16)
        chunk[others : others + 40 - first] = query[first:]
        found = np.asarray(attend_chunk(chunk, keys, values, tables, pieces, np.int32(num_pieces)))
        seen.append(found[others : others + 40 - first])
    for found in seen[1:]:
        np.testing.assert_array_equal(found, seen[0][-len(found) :])
