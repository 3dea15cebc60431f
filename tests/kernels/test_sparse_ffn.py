import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_models import fresh_seed

from inflash.kernels import reference
from inflash.kernels.compilation import jit
from inflash.kernels.sparse_ffn import block_ffn, gathered_ffn, observed_block_ffn

BFLOAT16 = ml_dtypes.bfloat16
SIZES = [(96, 200, 64), (200, 97, 24), (256, 1024, 512)]  # D, F, slots


def alternating_dtypes(batches: list[int]) -> list[tuple[int, tuple[int, int, int], type]]:
    """Each batch with all sizes. Compiling is what takes time, so dtypes alternate: every pair of values occurs, not every triple."""
    dtypes = [np.float32, BFLOAT16]
    return [(batch, sizes, dtypes[(i + j) % 2]) for i, batch in enumerate(batches) for j, sizes in enumerate(SIZES)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def normal(rng: np.random.Generator, *shape: int, dtype=np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def gathered_problem(rng, batch: int, sizes, num_padded: int, count: int, dtype) -> dict[str, np.ndarray]:
    d_model, d_ff, num_slots = sizes
    slots, ids = np.zeros((2, num_padded), np.int32)
    slots[:count] = rng.permutation(num_slots)[:count]
    ids[:count] = rng.permutation(d_ff)[:count]
    return {
        "accumulator": normal(rng, batch, d_model),
        "x": normal(rng, batch, d_model).astype(dtype).astype(np.float32),
        "bundles": normal(rng, num_slots, 2, d_model, dtype=dtype),
        "up_bias": normal(rng, d_ff),
        "predicted": rng.random((batch, d_ff)) < 0.7,
        "slots": slots,
        "neuron_ids": ids,
        "count": np.asarray(count, np.int32),
    }


def by_reference(problem: dict[str, np.ndarray]) -> np.ndarray:
    return reference.gathered_ffn(**{**problem, "count": int(problem["count"])})


def by_kernel(problem: dict[str, np.ndarray], compute_dtype) -> np.ndarray:
    arrays = {name: jnp.asarray(array) for name, array in problem.items()}
    return np.asarray(jit(gathered_ffn, static_argnames="compute_dtype")(**arrays, compute_dtype=compute_dtype))


def assert_close(found, expected: np.ndarray, added: np.ndarray, dtype) -> None:
    """bfloat16: each activation is rounded once more, by up to 2**-9 of itself; float32: sums of up to a few thousand terms."""
    scale = max(1.0, float(np.abs(added).max()))
    np.testing.assert_allclose(np.asarray(found), expected, atol=scale * (1e-5 if dtype == np.float32 else 1e-2))


@pytest.mark.parametrize(("batch", "sizes", "dtype"), alternating_dtypes([1, 2, 4, 7, 10]))
def test_gathered_agrees_with_reference(rng, batch, sizes, dtype):
    for num_padded, count in [(24, 17), (7, 7)] if sizes == SIZES[0] else [(24, 17)]:
        problem = gathered_problem(rng, batch, sizes, num_padded, count, dtype)
        expected = by_reference(problem)
        assert_close(by_kernel(problem, np.dtype(dtype)), expected, expected - problem["accumulator"], dtype)


@pytest.mark.parametrize("batch", [1, 4, 10])
@pytest.mark.parametrize("count", [0, 3])
def test_padding_may_be_uninitialised_memory(rng, batch, count):
    problem = gathered_problem(rng, batch, SIZES[0], 16, count, BFLOAT16)
    slots = problem["slots"]
    free = next(slot for slot in range(64) if slot not in slots[:count])
    problem["bundles"][free] = np.nan
    slots[count:], problem["neuron_ids"][count:] = free, rng.integers(0, 200, 16 - count)
    expected = by_reference(problem)
    assert_close(by_kernel(problem, "bfloat16"), expected, expected - problem["accumulator"], BFLOAT16)


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_float32_products_of_bfloat16_slots(rng, batch):
    problem = gathered_problem(rng, batch, SIZES[0], 32, 30, BFLOAT16)
    problem["x"] = normal(rng, batch, 96)  # not representable in bfloat16
    expected = by_reference(problem)
    assert_close(by_kernel(problem, "float32"), expected, expected - problem["accumulator"], np.float32)


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_neurons_add_up_whatever_the_split(rng, batch):
    """Also across the passes that a long gather is split into."""
    problem = gathered_problem(rng, batch, (256, 8192, 6000), 5000, 5000, np.float32)
    whole = by_kernel(problem, "float32")
    turned = {name: np.roll(problem[name], -2000) for name in ("slots", "neuron_ids")}
    first = by_kernel({**problem, "count": np.asarray(2000, np.int32)}, "float32")
    rest = by_kernel({**problem, **turned, "accumulator": first, "count": np.asarray(3000, np.int32)}, "float32")
    assert_close(rest, whole, whole - problem["accumulator"], np.float32)
    assert_close(whole, by_reference(problem), whole - problem["accumulator"], np.float32)


@pytest.mark.parametrize(("num_tokens", "sizes", "dtype"), alternating_dtypes([1, 4, 70]))
def test_block_agrees_with_reference(rng, num_tokens, sizes, dtype):
    d_model, num_rows, _ = sizes
    accumulator, x = normal(rng, num_tokens, d_model), normal(rng, num_tokens, d_model).astype(dtype).astype(np.float32)
    up, down = normal(rng, 2, num_rows, d_model, dtype=dtype)
    bias, predicted = normal(rng, num_rows), rng.random((num_tokens, num_rows)) < 0.5
    ffn = jit(functools.partial(block_ffn, compute_dtype=np.dtype(dtype)))
    dense = jit(functools.partial(block_ffn, count=num_rows, compute_dtype=np.dtype(dtype)))
    for count in (num_rows, num_rows // 3, 0):
        for keep in (None, predicted):
            kept = (np.ones_like(predicted) if keep is None else keep) & (np.arange(num_rows) < count)
            added = reference.neurons(x, up, down, bias, kept)
            operands = accumulator, x, jnp.asarray(up), jnp.asarray(down), bias
            assert_close(ffn(*operands, np.int32(count), keep), accumulator + added, added, dtype)
            if count == num_rows:
                assert_close(dense(*operands, predicted=keep), accumulator + added, added, dtype)


@pytest.mark.parametrize("num_tokens", [1, 70])
def test_rows_beyond_count_may_be_uninitialised_memory(rng, num_tokens):
    accumulator, x = normal(rng, num_tokens, 96), normal(rng, num_tokens, 96)
    up, down = normal(rng, 2, 64, 96)
    bias, count = normal(rng, 64), 41
    added = reference.neurons(x, up[:count], down[:count], bias, np.ones((num_tokens, count), bool))
    up[count:] = down[count:] = bias[count:] = np.nan
    ffn = jit(functools.partial(block_ffn, compute_dtype="float32"))
    assert_close(ffn(accumulator, x, up, down, bias, np.int32(count)), accumulator + added, added, np.float32)
    up[:] = down[:] = np.nan
    np.testing.assert_array_equal(np.asarray(ffn(accumulator, x, up, down, bias, np.int32(0))), accumulator)


OBSERVED = {name: jit(functools.partial(observed_block_ffn, compute_dtype=name)) for name in ("float32", "bfloat16")}


def slow_block(x, up, down, bias, kept) -> tuple[np.ndarray, np.ndarray]:
    """What some neurons add [B, D], and all neurons' pre-activations [B, n], both float64."""
    inputs = x.astype(np.float64) @ up.astype(np.float64).T + bias
    return np.where(kept, np.maximum(inputs, 0), 0) @ down.astype(np.float64), inputs


@pytest.mark.parametrize("num_tokens", [32, 3])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_observed_adds_and_tells_what_is_active(num_tokens, dtype):
    """What it tells is every neuron that the ReLU lets through, predicted or not; what it adds is the predicted ones."""
    rng, num_rows, d_model = np.random.default_rng(fresh_seed()), 97, 40
    accumulator, x = normal(rng, num_tokens, d_model), normal(rng, num_tokens, d_model).astype(dtype).astype(np.float32)
    up, down = normal(rng, 2, num_rows, d_model, dtype=dtype)
    bias, predicted = normal(rng, num_rows), rng.random((num_tokens, num_rows)) < 0.5
    for count in (num_rows, 31, 0):
        for mask in (None, predicted):
            real = np.arange(num_rows) < count
            kept = real[None] & (True if mask is None else mask)
            added, inputs = slow_block(x, up, down, bias, kept)
            operands = accumulator, x, jnp.asarray(up), jnp.asarray(down), bias
            total, active = OBSERVED[np.dtype(dtype).name](*operands, np.int32(count), mask)
            assert_close(total, accumulator + added, added, dtype)
            assert active.shape == (num_tokens, num_rows) and active.dtype == bool
            clear = np.abs(inputs) > 1e-4
            assert clear.mean() > 0.99
            np.testing.assert_array_equal(np.asarray(active)[clear], ((inputs > 0) & real[None])[clear])


def test_observed_products_of_bfloat16_rows_in_float32():
    """Inputs that bfloat16 cannot hold are not rounded."""
    rng = np.random.default_rng(fresh_seed())
    accumulator, x = normal(rng, 2, 32, 40)
    up, down = normal(rng, 2, 97, 40).astype(BFLOAT16)
    bias = normal(rng, 97)
    added, _ = slow_block(x, up, down, bias, True)
    total, _ = OBSERVED["float32"](accumulator, x, jnp.asarray(up), jnp.asarray(down), bias, np.int32(97))
    assert_close(total, accumulator + added, added, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e38])
def test_observed_rows_beyond_count_may_be_uninitialised_memory(garbage, dtype):
    """Also for tokens of which nothing was predicted but padding."""
    rng, count = np.random.default_rng(fresh_seed()), 41
    accumulator, x = normal(rng, 32, 40), normal(rng, 32, 40).astype(dtype).astype(np.float32)
    up, down = normal(rng, 2, 97, 40, dtype=dtype)
    bias, predicted = normal(rng, 97), rng.random((32, 97)) < 0.5
    predicted[3, :count], predicted[3, count:] = False, True
    added, inputs = slow_block(x, up[:count], down[:count], bias[:count], predicted[:, :count])
    up[count:] = down[count:] = bias[count:] = garbage
    observed = OBSERVED[np.dtype(dtype).name]
    total, active = observed(accumulator, x, jnp.asarray(up), jnp.asarray(down), bias, np.int32(count), predicted)
    assert_close(total, accumulator + added, added, dtype)
    np.testing.assert_array_equal(np.asarray(total)[3], accumulator[3])
    clear = np.abs(inputs) > 1e-4
    np.testing.assert_array_equal(np.asarray(active)[:, :count][clear], inputs[clear] > 0)
    assert not np.asarray(active)[:, count:].any()
    up[:] = down[:] = garbage
    total, active = observed(accumulator, x, jnp.asarray(up), jnp.asarray(down), bias, np.int32(0), predicted)
    np.testing.assert_array_equal(np.asarray(total), accumulator)
    assert not np.asarray(active).any()
