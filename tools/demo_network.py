"""The embedded model while it is trained: OPT as one differentiable function of float32 parameters.

Axes: B batch, T tokens, D d_model, F d_ff, H heads, V vocabulary.

The engine's kernels are built for reading weights once a token; training wants the opposite, so it has its own short forward pass.
A test holds both to the same logits.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

Parameters = dict[str, jax.Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """The embedded model's shape: 4.3 million parameters, OPT's proportions."""

    vocab_size: int = 4096
    d_model: int = 256
    d_ff: int = 1024
    num_layers: int = 4
    num_heads: int = 8
    max_positions: int = 512


def initial_parameters(key: jax.Array, config: DemoConfig) -> Parameters:
    """Random parameters under Hugging Face's names: normal(0.02), residual outputs scaled down by depth."""
    d_model, d_ff = config.d_model, config.d_ff
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (config.vocab_size, d_model),
        "model.decoder.embed_positions.weight": (config.max_positions + 2, d_model),  # OPT counts positions from 2
    }
    for layer in range(config.num_layers):
        prefix = f"model.decoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (d_model, d_model)
            shapes[f"{prefix}self_attn.{name}.bias"] = (d_model,)
        shapes[f"{prefix}fc1.weight"], shapes[f"{prefix}fc1.bias"] = (d_ff, d_model), (d_ff,)
        shapes[f"{prefix}fc2.weight"], shapes[f"{prefix}fc2.bias"] = (d_model, d_ff), (d_model,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"{prefix}{name}.weight"], shapes[f"{prefix}{name}.bias"] = (d_model,), (d_model,)
    shapes["model.decoder.final_layer_norm.weight"] = shapes["model.decoder.final_layer_norm.bias"] = (d_model,)

    parameters = {}
    for (name, shape), subkey in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        if name.endswith("layer_norm.weight"):
            parameters[name] = jnp.ones(shape)
        elif name.endswith(".bias"):
            parameters[name] = jnp.zeros(shape)
        else:
            residual = name.endswith(("out_proj.weight", "fc2.weight"))
            scale = 0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02
            parameters[name] = scale * jax.random.normal(subkey, shape)
    return parameters


def forward(
    parameters: Parameters,
    token_ids: jax.Array,  # [B, T] int32
    config: DemoConfig,
) -> tuple[jax.Array, list[jax.Array]]:
    """Logits [B, T, V] and each layer's activations after the ReLU, [B, T, F]."""
    num_tokens = token_ids.shape[1]
    embedding = parameters["model.decoder.embed_tokens.weight"]
    x = embedding[token_ids] + parameters["model.decoder.embed_positions.weight"][None, 2 : num_tokens + 2]
    activations = []
    for layer in range(config.num_layers):
        prefix = f"model.decoder.layers.{layer}."
        normed = _layer_norm(x, parameters, prefix + "self_attn_layer_norm")
        x = x + _attention(normed, parameters, prefix + "self_attn.", config.num_heads)
        normed = _layer_norm(x, parameters, prefix + "final_layer_norm")
        active = jax.nn.relu(_linear(normed, parameters, prefix + "fc1"))
        x = x + _linear(active, parameters, prefix + "fc2")
        activations.append(active)
    x = _layer_norm(x, parameters, "model.decoder.final_layer_norm")
    return x @ embedding.T, activations


def _linear(x: jax.Array, parameters: Parameters, name: str) -> jax.Array:
    return x @ parameters[name + ".weight"].T + parameters[name + ".bias"][None, None]


def _layer_norm(x: jax.Array, parameters: Parameters, name: str) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.mean(centred**2, -1, keepdims=True)
    return (
        centred * jax.lax.rsqrt(variance + 1e-5) * parameters[name + ".weight"][None, None]
        + parameters[name + ".bias"][None, None]
    )


def _attention(x: jax.Array, parameters: Parameters, prefix: str, num_heads: int) -> jax.Array:
    batch, num_tokens, d_model = x.shape
    split = (batch, num_tokens, num_heads, d_model // num_heads)
    query = _linear(x, parameters, prefix + "q_proj").reshape(split) * (d_model // num_heads) ** -0.5
    key = _linear(x, parameters, prefix + "k_proj").reshape(split)
    value = _linear(x, parameters, prefix + "v_proj").reshape(split)
    scores = jnp.einsum("bthd,bshd->bhts", query, key)
    causal = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
    weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -1e30), axis=-1)
    mixed = jnp.einsum("bhts,bshd->bthd", weights, value).reshape(x.shape)
    return _linear(mixed, parameters, prefix + "out_proj")
