"""A decoder in float64 NumPy, written for reading: what the fast code is compared with.

Axes: T tokens, D d_model, H heads, F d_ff, V vocabulary.
"""

from typing import Any

import numpy as np

from inflash.storage.checkpoint import CheckpointSource
from inflash.storage.layout import PART_NAMES, resident_layers, resident_specs
from inflash.storage.model_config import ModelConfig

Tensors = dict[str, np.ndarray]


def canonical_tensors(source: CheckpointSource) -> dict[str, Any]:
    """All of a source's tensors in its dtype, as the tree {"embeddings": {name: array}, "layers": {"0": {..., "up", "down"}}}."""
    tree: dict[str, Any] = {"embeddings": {}, "layers": {}}
    for layer in resident_layers(source.config):
        specs = resident_specs(source.config, layer, source.dtype)
        leaves = {spec.name: source.resident_tensor(spec.name, layer) for spec in specs}
        if layer is None:
            tree["embeddings"] = leaves
            continue
        bundles = source.neuron_rows(layer, 0, source.config.d_ff)
        for place, part in enumerate(PART_NAMES[source.config.num_parts]):
            leaves[part] = np.ascontiguousarray(bundles[:, place])
        tree["layers"][str(layer)] = leaves
    return tree


def forward(tensors: dict[str, Any], config: ModelConfig, token_ids: list[int] | np.ndarray) -> np.ndarray:
    """[T, V] float64 logits after each token of one sequence.

    Args:
      tensors: the tree of `canonical_tensors`.
      config: the model.
      token_ids: T of them.
    """
    embeddings = _float64(tensors["embeddings"])
    x = embeddings["tokens"][np.asarray(token_ids)]
    if "project_in" in embeddings:
        x = x @ embeddings["project_in"].T
    x = x + embeddings["positions"][config.position_offset :][: len(x)]
    for layer in range(config.num_layers):
        weights = _float64(tensors["layers"][str(layer)])
        for block, norm in ((_attention, "attention_norm"), (_feed_forward, "ffn_norm")):
            if config.norm_first:
                x = x + block(_norm(x, weights, norm, config), weights, config)
            else:
                x = _norm(x + block(x, weights, config), weights, norm, config)
    if config.final_norm:
        x = _norm(x, embeddings, "final_norm", config)
    if "project_out" in embeddings:
        x = x @ embeddings["project_out"].T
    return x @ embeddings["tokens" if config.tied_head else "head"].T


def _attention(x: np.ndarray, weights: Tensors, config: ModelConfig) -> np.ndarray:
    query, key, value = np.split(x @ weights["qkv"].T + weights["qkv_bias"], 3, axis=-1)

    def heads(projected: np.ndarray) -> np.ndarray:  # [T, D] to [H, T, D / H]
        return projected.reshape(len(x), config.num_heads, config.head_dim).swapaxes(0, 1)

    scores = heads(query) @ heads(key).swapaxes(1, 2) * config.head_dim**-0.5
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = (shares @ heads(value)).swapaxes(0, 1).reshape(x.shape)
    return mixed @ weights["attention_out"].T + weights["attention_out_bias"]


def _feed_forward(x: np.ndarray, weights: Tensors, config: ModelConfig) -> np.ndarray:
    active = np.maximum(x @ weights["up"].T + weights["up_bias"], 0.0)
    return active @ weights["down"] + weights["down_bias"]


def _norm(x: np.ndarray, weights: Tensors, name: str, config: ModelConfig) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return scaled * weights[f"{name}_scale"] + weights[f"{name}_bias"]


def _float64(tensors: Tensors) -> Tensors:
    return {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
