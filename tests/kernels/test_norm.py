import numpy as np
import pytest

from inflash.kernels import reference
from inflash.kernels.compilation import jit
from inflash.kernels.norm import layer_norm


@pytest.mark.parametrize("shape", [(1, 96), (3, 200), (130, 256)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_agrees_with_reference(shape, offset):
    rng = np.random.default_rng()
    x = (rng.standard_normal(shape) + offset).astype(np.float32)
    scale, bias = rng.standard_normal((2, shape[1])).astype(np.float32)
    found = np.asarray(jit(layer_norm, static_argnums=3)(x, scale, bias, 1e-5))
    # An offset of 100 leaves values of size 1 with float32's error at 100: 100 * 2**-24, times scales up to about 4.
    np.testing.assert_allclose(found, reference.layer_norm(x, scale, bias, 1e-5), atol=1e-5 if offset == 0 else 2e-4)


def test_constant_row_gives_the_bias():
    bias = np.arange(96, dtype=np.float32)
    found = jit(layer_norm, static_argnums=3)(np.full((2, 96), 3.0, np.float32), np.ones(96, np.float32), bias, 1e-5)
    np.testing.assert_allclose(np.asarray(found), np.stack([bias, bias]), atol=1e-3)
