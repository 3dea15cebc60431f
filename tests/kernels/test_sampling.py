import os

import jax.numpy as jnp
import numpy as np
import pytest

from inflash.kernels import reference_sampling as reference
from inflash.kernels import sampling

V = 257
BORDER = 1e-4  # a float32 sum may fall on the other side of a threshold this near


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"rng seed {seed}")
    return np.random.default_rng(seed)


def f32(values) -> jnp.ndarray:
    return jnp.asarray(np.asarray(values, np.float32))


def i32(values) -> jnp.ndarray:
    return jnp.asarray(np.asarray(values, np.int32))


def seeds_of(*seeds: int) -> jnp.ndarray:
    return jnp.asarray(np.stack([sampling.seed_words(seed) for seed in seeds]))


def draws(logits, num, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, index=0) -> np.ndarray:
    """`num` draws from one row, which differ in their seeds."""
    full = [np.full(num, value, np.float32) for value in (temperature, top_p, min_p)]
    seeds = seeds_of(*range(seed, seed + num))
    rows = f32(np.tile(logits, (num, 1)))
    tokens = sampling.sample_filtered(
        rows, f32(full[0]), i32(np.full(num, top_k)), f32(full[1]), f32(full[2]), seeds, i32(np.full(num, index))
    )
    return np.asarray(tokens)


def test_greedy_takes_the_first_of_the_most_likely(rng):
    logits = rng.integers(-3, 4, (40, V)).astype(np.float32)  # many equals
    tokens = sampling.greedy(f32(logits))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-40])
def test_temperatures_near_zero_are_greedy_in_every_function(rng, temperature):
    logits = rng.normal(0, 3, (9, V)).astype(np.float32)
    seeds, index, cold = seeds_of(*range(9)), i32(np.arange(9)), f32(np.full(9, temperature))
    np.testing.assert_array_equal(sampling.sample(f32(logits), cold, seeds, index), logits.argmax(-1))
    filtered = sampling.sample_filtered(
        f32(logits), cold, i32(np.full(9, 5)), f32(np.full(9, 0.5)), f32(np.full(9, 0.1)), seeds, index
    )
    np.testing.assert_array_equal(filtered, logits.argmax(-1))


@pytest.mark.parametrize("equals", [False, True])
def test_kept_tokens_are_exactly_the_reference_s(rng, equals):
    rows = 64
    logits = rng.normal(0, 2.5, (rows, V)).astype(np.float32)
    if equals:
        logits = np.round(logits * 2) / 2
    logits[rng.random((rows, V)) < 0.05] = -np.inf
    temperature = rng.uniform(0.3, 2, rows).astype(np.float32)
    top_k = np.where(rng.random(rows) < 0.4, 0, rng.integers(-1, V + 9, rows)).astype(np.int32)
    top_p = np.where(rng.random(rows) < 0.3, 1, rng.uniform(0.01, 1, rows)).astype(np.float32)
    min_p = np.where(rng.random(rows) < 0.5, 0, rng.uniform(0, 0.3, rows)).astype(np.float32)
    kept = np.asarray(sampling.kept_tokens(f32(logits), f32(temperature), i32(top_k), f32(top_p), f32(min_p)))
    compared = 0
    for row in range(rows):
        arguments = logits[row], float(temperature[row]), int(top_k[row])
        near = [
            reference.kept_tokens(*arguments, float(top_p[row]) * (1 + p), float(min_p[row]) * (1 + m))
            for p in (-BORDER, 0, BORDER * (top_p[row] < 1))
            for m in (-BORDER, 0, BORDER)
        ]
        if top_p[row] == 1:
            near = near[3:]  # 1 means all: a little less does not
        if all(np.array_equal(mask, near[0]) for mask in near):
            compared += 1
            np.testing.assert_array_equal(kept[row], near[0], f"row {row}")
    assert compared > rows * 0.7
    assert kept[np.arange(rows), logits.argmax(-1)].all()


def test_the_most_likely_token_survives_the_narrowest_filters(rng):
    logits = rng.normal(0, 3, (4, V)).astype(np.float32)
    narrow = (i32([1, 0, 0, 1]), f32([1, 0, 1, 1e-7]), f32([0, 0, 1, 1]))
    kept = np.asarray(sampling.kept_tokens(f32(logits), f32(np.ones(4)), *narrow))
    np.testing.assert_array_equal(kept, np.arange(V) == logits.argmax(-1)[:, None])


def test_zeros_of_both_signs_share_one_fate():
    logits = f32([[0.0, -0.0, -1.0, -0.0]])
    kept = sampling.kept_tokens(logits, f32([1]), i32([1]), f32([1]), f32([0]))
    np.testing.assert_array_equal(kept, [[True, True, False, True]])


def test_neutral_filters_keep_everything(rng):
    logits = rng.normal(0, 40, (3, V)).astype(np.float32)  # most probabilities underflow
    kept = sampling.kept_tokens(f32(logits), f32(np.ones(3)), i32([0, -1, V]), f32(np.ones(3)), f32(np.zeros(3)))
    assert np.asarray(kept).all()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (1.7, 9, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1), (1.3, 12, 0.9, 0.02)],
)
def test_tokens_come_as_often_as_they_should(temperature, top_k, top_p, min_p):
    """Chi-square at a fixed seed: mean = degrees of freedom, standard deviation sqrt(2 dof); 5 of them are never reached."""
    num = 20_000
    logits = np.random.default_rng(3).normal(0, 1.2, 31).astype(np.float32)
    expected = num * reference.distribution(logits, temperature, top_k, top_p, min_p)
    counts = np.bincount(draws(logits, num, temperature, top_k, top_p, min_p), minlength=31)
    assert not counts[expected == 0].any()
    likely = expected > 5
    freedom = likely.sum() - 1
    chi_square = np.sum((counts - expected)[likely] ** 2 / expected[likely])
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_draws_of_one_seed_at_successive_tokens_are_independent():
    """Pairs of successive draws from a fair coin come equally often."""
    num = 4_000
    logits = f32(np.zeros((num, 2)))
    seeds = jnp.asarray(np.tile(sampling.seed_words(11), (num, 1)))
    tokens = np.asarray(sampling.sample(logits, f32(np.ones(num)), seeds, i32(np.arange(num))))
    pairs = np.bincount(tokens[:-1] * 2 + tokens[1:], minlength=4)
    assert np.all(np.abs(pairs - num / 4) < 5 * np.sqrt(num / 4))


def test_a_row_s_draw_depends_on_neither_batch_mates_nor_slot(rng):
    rows = 7
    logits = rng.normal(0, 2, (rows, V)).astype(np.float32)
    seeds = np.stack([sampling.seed_words(int(seed)) for seed in rng.integers(0, 2**62, rows)])
    index = rng.integers(0, 1000, rows).astype(np.int32)
    temperature = rng.uniform(0.5, 2, rows).astype(np.float32)
    together = np.asarray(sampling.sample(f32(logits), f32(temperature), jnp.asarray(seeds), i32(index)))
    order = rng.permutation(rows)
    shuffled = sampling.sample(f32(logits[order]), f32(temperature[order]), jnp.asarray(seeds[order]), i32(index[order]))
    np.testing.assert_array_equal(shuffled, together[order])
    for row in range(rows):
        one = slice(row, row + 1)
        alone = sampling.sample(f32(logits[one]), f32(temperature[one]), jnp.asarray(seeds[one]), i32(index[one]))
        np.testing.assert_array_equal(alone, together[one])
        again = sampling.sample(f32(logits[one]), f32(temperature[one]), jnp.asarray(seeds[one]), i32(index[one]))
        np.testing.assert_array_equal(again, alone)


def test_a_batch_mate_s_filters_do_not_change_a_row_that_has_none(rng):
    rows = 200
    logits = rng.normal(0, 2, (rows, V)).astype(np.float32)
    seeds, index = seeds_of(*range(rows)), i32(np.arange(rows))
    temperature = f32(rng.uniform(0.5, 2, rows))
    plain = np.asarray(sampling.sample(f32(logits), temperature, seeds, index))
    filters = np.arange(rows) % 2 == 1
    filtered = sampling.sample_filtered(
        f32(logits),
        temperature,
        i32(np.where(filters, 3, 0)),
        f32(np.where(filters, 0.5, 1)),
        f32(np.where(filters, 0.2, 0)),
        seeds,
        index,
    )
    np.testing.assert_array_equal(np.asarray(filtered)[~filters], plain[~filters])
    assert np.any(np.asarray(filtered)[filters] != plain[filters])


def test_another_seed_or_token_index_is_another_draw():
    logits = np.zeros(V, np.float32)
    assert len(set(draws(logits, 50))) > 30
    assert np.mean(draws(logits, 50, index=0) == draws(logits, 50, index=1)) < 0.2


def test_seed_words_of_different_integers_differ():
    parts = [(0, 0), (0, 1), (1, 0), (-1, 0), (2**32, 0), (2**64 - 2, 0), (0, 2**32), (0, 0, 0), (0,)]
    words = {tuple(sampling.seed_words(*part).tolist()) for part in parts}
    assert len(words) == len(parts)
    assert sampling.seed_words(5, 1).dtype == np.uint32
    np.testing.assert_array_equal(sampling.seed_words(5, 1), sampling.seed_words(5, 1))


def test_penalties_match_the_reference(rng):
    rows = 6
    logits = rng.normal(0, 3, (rows, V)).astype(np.float32)
    prompt, output = (rng.poisson(0.3, (rows, V)).astype(np.int32) for _ in range(2))
    repetition = rng.uniform(0.5, 2, rows).astype(np.float32)
    presence, frequency = (rng.uniform(-2, 2, rows).astype(np.float32) for _ in range(2))
    penalized = sampling.penalize(f32(logits), i32(prompt), i32(output), f32(repetition), f32(presence), f32(frequency))
    expected = reference.penalize(logits, prompt, output, repetition, presence, frequency)
    np.testing.assert_allclose(penalized, expected, rtol=1e-5, atol=1e-5)


def test_neutral_penalties_change_no_bit(rng):
    logits = rng.normal(0, 3, (3, V)).astype(np.float32)
    counts = i32(rng.poisson(0.5, (3, V)))
    one, zero = f32(np.ones(3)), f32(np.zeros(3))
    np.testing.assert_array_equal(sampling.penalize(f32(logits), counts, counts, one, zero, zero), logits)


def test_suppressed_tokens_never_come(rng):
    logits = rng.normal(0, 1, (2, V)).astype(np.float32)
    result = np.asarray(sampling.suppress(f32(logits), i32([[3, 200], [5, V]])))
    expected = logits.copy()
    expected[0, [3, 200]] = expected[1, 5] = -np.inf
    np.testing.assert_array_equal(result, expected)
    only = np.where(np.arange(V) == 4, 0.0, -np.inf)
    assert set(draws(only, 20)) == {4}


def test_biases_are_added_to_their_tokens_only(rng):
    logits = rng.normal(0, 3, (4, V)).astype(np.float32)
    token_ids = np.array([rng.permutation(V)[:5] for _ in range(4)], np.int32)
    biases = rng.uniform(-100, 100, (4, 5)).astype(np.float32)
    expected = logits.astype(np.float64)
    for row in range(4):
        for token, added in zip(token_ids[row], biases[row], strict=True):
            expected[row, token] += added
    token_ids[1, 3:] = V  # padding
    expected[1] = logits[1]
    for token, added in zip(token_ids[1, :3], biases[1, :3], strict=True):
        expected[1, token] += added
    np.testing.assert_allclose(sampling.bias(f32(logits), i32(token_ids), f32(biases)), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_top_logprobs_match_the_reference(rng, k):
    logits = rng.normal(0, 3, (5, V)).astype(np.float32)
    values, ids = sampling.top_logprobs(f32(logits), k=k)
    expected_values, expected_ids = reference.top_logprobs(logits, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(values, expected_values, atol=1e-5)


def test_the_chosen_token_s_logprob_and_rank_match_the_reference(rng):
    logits = np.round(rng.normal(0, 3, (30, V)), 1).astype(np.float32)  # with equals
    chosen = rng.integers(0, V, 30).astype(np.int32)
    values, ranks = sampling.token_logprobs(f32(logits), i32(chosen))
    expected_values, expected_ranks = reference.token_logprobs(logits, chosen)
    np.testing.assert_array_equal(ranks, expected_ranks)
    np.testing.assert_allclose(values, expected_values, atol=1e-5)
