"""Signs of a matrix, a bit each. Axes: F d_ff, D d_model, W bytes of a packed row."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import fresh_seed

from inflash.storage.sign_bits import packed_signs, sign_scale

SIZES = [(64, 20), (60, 7), (97, 3), (8, 5), (5, 4), (1, 2)]  # D, F


def slowly(up: np.ndarray) -> np.ndarray:
    """What `storage.predictor_layout` says, weight by weight."""
    width = (up.shape[1] + 7) // 8
    packed = np.zeros((len(up), width), int)
    for neuron, row in enumerate(up):
        for place, weight in enumerate(row):
            bit, byte = divmod(place, width)
            if weight > 0:
                packed[neuron, byte] += 1 << bit
    return packed


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_layout_is_the_one_described(size: tuple[int, int], dtype: type) -> None:
    up = np.random.default_rng(fresh_seed()).standard_normal(size[::-1]).astype(dtype)
    found = packed_signs(up)
    assert found.dtype == np.uint8
    assert found.shape == (size[1], (size[0] + 7) // 8)
    np.testing.assert_array_equal(found, slowly(up))


@given(d_model=st.integers(1, 40), d_ff=st.integers(1, 4), seed=st.integers(0, 1 << 31))
def test_the_layout_at_any_size(d_model: int, d_ff: int, seed: int) -> None:
    up = np.random.default_rng(seed).standard_normal((d_ff, d_model))
    np.testing.assert_array_equal(packed_signs(up), slowly(up))


def test_zeros_are_not_positive() -> None:
    up = np.asarray([[0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 1.0]], np.float32)
    np.testing.assert_array_equal(packed_signs(up), [[0b10010100]])  # one byte a row, so bit j is weight j


def test_padding_is_zero_whatever_the_weights() -> None:
    """Twelve weights take two bytes, six bits of each."""
    np.testing.assert_array_equal(packed_signs(np.ones((3, 12))), np.full((3, 2), 0b00111111))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_scale_is_the_mean_magnitude(dtype: type) -> None:
    rng = np.random.default_rng(fresh_seed())
    up = (rng.standard_normal((30, 61)) * np.exp2(rng.integers(-8, 8, (30, 1)))).astype(dtype)
    found = sign_scale(up)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.abs(up.astype(np.float64)).mean(1), rtol=1e-6)


def test_no_other_scale_is_closer() -> None:
    """The claim of arXiv:1603.05279: least squares for the given signs."""
    up = np.random.default_rng(fresh_seed()).standard_normal((50, 96))
    signs, scale = np.where(up > 0, 1.0, -1.0), sign_scale(up).astype(np.float64)[:, None]

    def error(factor: float) -> np.ndarray:
        return ((up - factor * scale * signs) ** 2).sum(1)

    for factor in (0.9, 0.999, 1.001, 1.1):
        assert (error(1.0) < error(factor)).all()
