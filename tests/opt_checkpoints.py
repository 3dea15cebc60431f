"""Makes tiny random OPT checkpoints in Hugging Face's format, without PyTorch. Also run by golden/make_golden.py, so it needs no inflash.

Every tensor is a function of (seed, its name), whatever the variant, the sharding or the prefix: golden files rest on that.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_PLAIN: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 128,
    "hidden_size": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "ffn_dim": 192},
    "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False, "num_attention_heads": 8},
    "untied": {"tie_word_embeddings": False},
    "odd": {"hidden_size": 96, "ffn_dim": 200, "num_attention_heads": 6},
}


def opt_config(variant: str = "plain", dtype: str = "float32", **overrides: Any) -> dict[str, Any]:
    """A config.json, with the keys of transformers 4 for 16-bit weights (as the Hub's OPT has them) and of 5 for float32."""
    dtype_key = "dtype" if dtype == "float32" else "torch_dtype"
    config = {**_PLAIN, **VARIANTS[variant], **overrides, dtype_key: dtype}
    config.setdefault("word_embed_proj_dim", config["hidden_size"])
    return config


def opt_tensors(config: dict[str, Any], seed: int = 0, prefix: str = "model.decoder.") -> dict[str, np.ndarray]:
    """All tensors of a config by their Hugging Face names, float32."""
    width, ffn, embed = config["hidden_size"], config["ffn_dim"], config["word_embed_proj_dim"]
    bias, affine = config.get("enable_bias", True), config.get("layer_norm_elementwise_affine", True)
    pre_norm = config["do_layer_norm_before"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config["vocab_size"], embed),
        "embed_positions.weight": (config["max_position_embeddings"] + 2, width),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        if affine:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for layer in range(config["num_hidden_layers"]):
        block = f"layers.{layer}."
        for module in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{block}self_attn.{module}", width, width)
        linear(f"{block}fc1", ffn, width)
        linear(f"{block}fc2", width, ffn)
        norm(f"{block}self_attn_layer_norm")
        norm(f"{block}final_layer_norm")
    if embed != width:
        shapes["project_in.weight"], shapes["project_out.weight"] = (width, embed), (embed, width)
    if pre_norm and not config["_remove_final_layer_norm"]:
        norm("final_layer_norm")
    tensors = {prefix + name: _random(seed, name, shape) for name, shape in shapes.items()}
    if not config.get("tie_word_embeddings", True):
        tensors["lm_head.weight"] = _random(seed, "lm_head.weight", (config["vocab_size"], embed))
    return tensors


def write_opt_checkpoint(
    folder: Path,
    *,
    variant: str = "plain",
    dtype: str = "float32",
    seed: int = 0,
    shards: int = 1,
    prefix: str = "model.decoder.",
    **config_overrides: Any,
) -> dict[str, np.ndarray]:
    """Writes config.json and safetensors files to `folder`, which is made when it does not exist.

    Args:
      variant: "plain"; "350m" (post-LN, projections); "galactica" (no biases, no learned norms); "untied" (a head of its own);
        "odd" (d_model 96, d_ff 200).
      dtype: of all tensors: "float32", "float16" or "bfloat16".
      shards: files to spread the tensors over; more than one come with an index.
      config_overrides: keys of config.json; sizes among them change the tensors too.

    Returns:
      The tensors as written, by their Hugging Face names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = opt_config(variant, dtype, **config_overrides)
    tensors = {name: tensor.astype(_DTYPES[dtype]) for name, tensor in opt_tensors(config, seed, prefix).items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map: dict[str, str] = {}
    for shard, names in enumerate(np.array_split(list(tensors), shards), start=1):
        file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): tensors[str(name)] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update({str(name): file for name in names})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return tensors


def checksum(tensors: dict[str, np.ndarray]) -> int:
    """CRC-32 of all tensors' bytes: whether two machines made the same checkpoint."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].tobytes(), value)
    return value


def _random(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of such a size that activations stay near 1 and logits differ by a few units between tokens."""
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if len(shape) == 1:
        values = values * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    else:
        values *= 0.3 if name.startswith(("embed_", "lm_head")) else shape[1] ** -0.5
    return values.astype(np.float32)
