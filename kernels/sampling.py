"""From logits to token ids, one call a token for the whole batch.

Axes: B batch rows, V vocabulary, S suppressed or biased ids (padded), K most likely tokens.

Three ways to choose, from cheap to dear: `greedy`, `sample` (temperature alone) and `sample_filtered` (top-k, top-p, min-p). A
row gets the same token from the dearer function as from the cheaper one when its own parameters ask for nothing more, so that a
batch may use whichever one of its rows needs. None of them sorts the vocabulary.

A row's draw is a function of its seed, the index of its token and its logits: neither its batch mates nor its slot matter.
Penalties and log-probabilities are separate functions, to be called only when some request asks for them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GREEDY_BELOW = 1e-5  # temperatures under it are greedy: dividing by them would leave only overflow
LEAST_TOP_P = 1e-30  # a mass of 0 would be reached without any token
KEY_BITS = 32


def seed_words(*parts: int) -> np.ndarray:
    """Hashes integers (a seed, the number of a choice, ...) to the two words that a row of `seeds` holds.

    Args:
      parts: integers of up to 64 bits; a negative one is its two's complement.

    Returns:
      [2] uint32.
    """
    words = [(part >> shift) & 0xFFFFFFFF for part in parts for shift in (0, 32)]
    return np.random.SeedSequence([len(parts), *words]).generate_state(2, np.uint32)


@jax.jit
def greedy(logits: jax.Array) -> jax.Array:
    """The most likely token of each row, the lowest id among equals.

    Args:
      logits: [B, V] f32.

    Returns:
      [B] int32 token ids.
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def sample(logits: jax.Array, temperature: jax.Array, seeds: jax.Array, token_index: jax.Array) -> jax.Array:
    """Draws from softmax(logits / temperature) by the Gumbel-max trick: one pass over V.

    Args:
      logits: [B, V] f32; -inf never comes.
      temperature: [B] f32; greedy where below 1e-5.
      seeds: [B, 2] uint32, as `seed_words` makes them.
      token_index: [B] int32, how many tokens the row has generated before this one.

    Returns:
      [B] int32 token ids.
    """
    return _draw(_scaled(logits, temperature), temperature, seeds, token_index)


@jax.jit
def sample_filtered(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seeds: jax.Array,
    token_index: jax.Array,
) -> jax.Array:
    """Draws like `sample`, among the tokens of `kept_tokens`.

    Args:
      logits: [B, V] f32.
      temperature: [B] f32; greedy where below 1e-5.
      top_k: [B] int32, 0 or less for all.
      top_p: [B] f32 in [0, 1]; 0 leaves the most likely token.
      min_p: [B] f32 in [0, 1].
      seeds: [B, 2] uint32.
      token_index: [B] int32.

    Returns:
      [B] int32 token ids.
    """
    kept = kept_tokens(logits, temperature, top_k, top_p, min_p)
    return _draw(jnp.where(kept, _scaled(logits, temperature), -jnp.inf), temperature, seeds, token_index)


@jax.jit
def kept_tokens(logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Which tokens min-p, then top-k, then top-p leave; equal logits share one fate, and the most likely token always stays.

    min-p keeps probabilities of at least `min_p` times the largest; top-k those from the k-th largest on; top-p the fewest of
    what is left that hold `top_p` of its mass. Both thresholds are found bit by bit, in 32 passes over V each: on CPU a sort takes
    many times as long.

    Args:
      logits: [B, V] f32.
      temperature: [B] f32.
      top_k: [B] int32, 0 or less for all.
      top_p: [B] f32 in [0, 1]; 0 leaves the most likely token.
      min_p: [B] f32 in [0, 1].

    Returns:
      [B, V] bool.
    """
    weights = jnp.exp(_scaled(logits, temperature))  # 1 for the most likely token
    keys = _ordered_keys(logits)
    wanted = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)
    kept = keys >= _threshold(keys, jnp.ones_like(weights), wanted)[:, None]
    kept &= weights >= min_p[:, None]
    weights = jnp.where(kept, weights, 0.0)
    mass = jnp.maximum(top_p, LEAST_TOP_P) * jnp.sum(weights, axis=-1)
    nucleus = keys >= _threshold(keys, weights, mass)[:, None]
    return kept & (nucleus | (top_p >= 1.0)[:, None])


@jax.jit
def penalize(
    logits: jax.Array,
    prompt_counts: jax.Array,
    output_counts: jax.Array,
    repetition: jax.Array,
    presence: jax.Array,
    frequency: jax.Array,
) -> jax.Array:
    """Makes tokens that came before less likely (or more, with values on the other side of neutral).

    Repetition divides positive logits and multiplies negative ones, for tokens of prompt and output; presence is subtracted once
    and frequency once per occurrence, for tokens of the output.

    Args:
      logits: [B, V] f32.
      prompt_counts: [B, V] int32, occurrences of each token in the prompt.
      output_counts: [B, V] int32, in what was generated.
      repetition: [B] f32 above 0, neutral 1.
      presence: [B] f32, neutral 0.
      frequency: [B] f32, neutral 0.

    Returns:
      [B, V] f32.
    """
    repetition = repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(prompt_counts + output_counts > 0, repeated, logits)
    logits -= frequency[:, None] * output_counts.astype(jnp.float32)
    return logits - presence[:, None] * (output_counts > 0).astype(jnp.float32)


@jax.jit
def suppress(logits: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Makes tokens impossible: the end of text before `min_tokens`.

    Args:
      logits: [B, V] f32.
      token_ids: [B, S] int32; V fills the places of rows that suppress fewer.

    Returns:
      [B, V] f32, -inf at the given ids.
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, token_ids].set(-jnp.inf, mode="drop")


@jax.jit
def bias(logits: jax.Array, token_ids: jax.Array, biases: jax.Array) -> jax.Array:
    """Makes single tokens more or less likely.

    Args:
      logits: [B, V] f32.
      token_ids: [B, S] int32, none twice in a row; V fills the places of rows that bias fewer.
      biases: [B, S] f32.

    Returns:
      [B, V] f32, each bias added at its id.
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, token_ids].add(biases, mode="drop")


@partial(jax.jit, static_argnames="k")
def top_logprobs(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k most likely tokens, the best first.

    Args:
      logits: [B, V] f32; the model's own (before penalties and temperature) give the log-probabilities that vLLM reports.
      k: K, at most V.

    Returns:
      Natural log-probabilities [B, K] f32 and token ids [B, K] int32.
    """
    return lax.top_k(jax.nn.log_softmax(logits, axis=-1), k)


@jax.jit
def token_logprobs(logits: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-probability of one token of each row, and its rank: 1 for the most likely, equals share the better rank.

    Args:
      logits: [B, V] f32.
      token_ids: [B] int32.

    Returns:
      [B] f32 and [B] int32.
    """
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32)
    return chosen[:, 0] - jax.nn.logsumexp(logits, axis=-1), rank


def _scaled(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """[B, V] f32 logits / temperature, the largest moved to 0; only moved where the row is greedy."""
    divisor = jnp.where(temperature < GREEDY_BELOW, 1.0, temperature)
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / divisor[:, None]


def _draw(scaled: jax.Array, temperature: jax.Array, seeds: jax.Array, token_index: jax.Array) -> jax.Array:
    """argmax(scaled + Gumbel noise), without the noise where the row is greedy."""

    def noise(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), index)
        return jax.random.gumbel(key, scaled.shape[-1:], jnp.float32)

    random = jnp.where((temperature < GREEDY_BELOW)[:, None], 0.0, jax.vmap(noise)(seeds, token_index))
    return jnp.argmax(scaled + random, axis=-1).astype(jnp.int32)


def _ordered_keys(logits: jax.Array) -> jax.Array:
    """[B, V] uint32 that compare as the logits do."""
    bits = lax.bitcast_convert_type(jnp.where(logits == 0.0, 0.0, logits), jnp.uint32)  # -0.0 equals 0.0
    sign = jnp.uint32(1 << (KEY_BITS - 1))
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _threshold(keys: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """[B] uint32: the largest key from which on the weights [B, V] add up to at least `wanted` [B]; 0 where all do not."""

    def try_bit(step: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1 << (KEY_BITS - 1)) >> step.astype(jnp.uint32))
        weight = jnp.sum(jnp.where(keys >= candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(weight >= wanted, candidate, found)

    return lax.fori_loop(0, KEY_BITS, try_bit, jnp.zeros(keys.shape[0], jnp.uint32))
