"""What every kernel computes, in plain float64 NumPy: slow, obvious and independent of the kernels.

Axes: B batch, T tokens of prompts, D d_model, F d_ff, H heads, K gathered neurons (padded), N blocks of the KV
cache, size positions of each, M blocks of a sequence's table.

Tests compare against these; nothing else uses them.
"""

import numpy as np

Array = np.ndarray


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """[B, K], [N, K], [N] -> [B, N]."""
    product = f64(x) @ f64(weight).T
    return product if bias is None else product + f64(bias)


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """[B, D] -> [B, D]."""
    x = f64(x)
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * f64(scale) + f64(bias)


def softmax(scores: Array) -> Array:
    """Along the only axis."""
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


def attend(query: Array, keys: Array, values: Array) -> Array:
    """One query [H, head_dim] over positions [H, P, head_dim] that it may all see -> [H * head_dim]."""
    num_heads, head_dim = query.shape
    heads = [softmax(f64(keys[h]) @ f64(query[h]) / np.sqrt(head_dim)) @ f64(values[h]) for h in range(num_heads)]
    return np.concatenate(heads)


def positions_of(cache: Array, table: Array, length: int) -> Array:
    """A sequence's positions out of a cache in blocks [H, N, size, head_dim]: [H, length, head_dim]."""
    size = cache.shape[2]
    rows = [cache[:, table[p // size], p % size] for p in range(length)]
    return np.stack(rows, axis=1)


def attend_decode(query: Array, keys: Array, values: Array, tables: Array, lengths: Array) -> Array:
    """[B, H, head_dim], [H, N, size, head_dim] twice, [B, M], [B] -> [B, H * head_dim]."""
    pairs = enumerate(zip(tables, lengths, strict=True))
    return np.stack([attend(query[b], positions_of(keys, table, n), positions_of(values, table, n)) for b, (table, n) in pairs])


def append(cache: Array, new: Array, tables: Array, sequences: Array, positions: Array) -> Array:
    """The cache with new[t] at positions[t] of sequences[t]; what has no block, or no table, is dropped."""
    cache = cache.copy()
    _, num_blocks, size, _ = cache.shape
    for row, sequence, position in zip(new, sequences, positions, strict=True):
        block, offset = divmod(position, size)
        if sequence < len(tables) and block < tables.shape[1] and tables[sequence, block] < num_blocks:
            cache[:, tables[sequence, block], offset] = row
    return cache


def predict(h: Array, first: Array, second: Array, bias: Array, threshold: float, between: str = "none") -> tuple[Array, Array]:
    """Which neurons [B, F] bool, and how far each score is from the threshold."""
    coordinates = f64(h) @ f64(first).T
    if between == "relu":
        coordinates = np.maximum(coordinates, 0)
    margin = coordinates @ f64(second).T + f64(bias) - threshold
    return margin > 0, margin


def neurons(x: Array, up: Array, down: Array, up_bias: Array, keep: Array) -> Array:
    """What the kept neurons add, [B, D], neuron by neuron; keep is [B, neurons]."""
    total = np.zeros((len(x), down.shape[1]))
    for b in range(len(x)):
        for neuron in np.flatnonzero(keep[b]):
            active = max(0.0, f64(up[neuron]) @ f64(x[b]) + float(up_bias[neuron]))
            total[b] += active * f64(down[neuron])
    return total


def gathered_ffn(
    accumulator: Array,
    x: Array,
    bundles: Array,
    up_bias: Array,
    predicted: Array,
    slots: Array,
    neuron_ids: Array,
    count: int,
) -> Array:
    """The accumulator plus the first `count` of the gathered neurons."""
    slots, neuron_ids = slots[:count], neuron_ids[:count]
    added = neurons(x, bundles[slots, 0], bundles[slots, 1], up_bias[neuron_ids], predicted[:, neuron_ids])
    return f64(accumulator) + added


def decoder_attention(
    x: Array, weights: dict[str, Array], keys: Array, values: Array, num_heads: int, norm_first: bool, epsilon: float
) -> tuple[Array, Array]:
    """The newest token of one sequence: x [D], keys and values [H, P, head_dim] of the positions before it.

    Returns the residual (down bias included) and the FFN's input, both [D].
    """

    def norm(vector: Array, name: str) -> Array:
        return layer_norm(vector[None], weights[f"{name}_scale"], weights[f"{name}_bias"], epsilon)[0]

    x = f64(x)
    normed = norm(x, "attention_norm") if norm_first else x
    query, key, value = (f64(weights["qkv"]) @ normed + f64(weights["qkv_bias"])).reshape(3, num_heads, 1, -1)
    keys, values = np.concatenate([f64(keys), key], axis=1), np.concatenate([f64(values), value], axis=1)
    mixed = attend(query[:, 0], keys, values)
    x = x + f64(weights["attention_out"]) @ mixed + f64(weights["attention_out_bias"])
    if norm_first:
        ffn_in = norm(x, "ffn_norm")
    else:
        x = ffn_in = norm(x, "attention_norm")
    return x + f64(weights["down_bias"]), ffn_in


def f64(array: Array) -> Array:
    return np.asarray(array, np.float64)
